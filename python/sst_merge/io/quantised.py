"""Bases whose weights are quantised: in their files, or by bitsandbytes on loading."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .loading import loading

# quant_method of a model's config.json -> the module that runs it, and the package that has it
_QUANTISERS = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"), "gptq": ("gptqmodel", "gptqmodel"), "awq": ("gptqmodel", "gptqmodel"),
    "aqlm": ("aqlm", "aqlm"), "quanto": ("optimum.quanto", "optimum-quanto"), "eetq": ("eetq", "eetq"), "hqq": ("hqq", "hqq"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"), "torchao": ("torchao", "torchao"), "vptq": ("vptq", "vptq"),
    "mxfp4": ("kernels", "kernels"), "higgs": ("flute", "flute-kernel"), "fbgemm_fp8": ("fbgemm_gpu", "fbgemm-gpu"),
    "auto-round": ("auto_round", "auto-round"), "quark": ("quark", "amd-quark"), "spqr": ("spqr_quant", "spqr_quant"),
}  # fmt: skip


def stored_quantization(folder: Path) -> str:
    """The method by which a model's files are quantised, "" for plain weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def need_package(source: str | Path, method: str) -> None:
    module, package = _QUANTISERS.get(method, ("", ""))
    if module and not installed(module):
        raise ModelError(
            f"model {source}: its weights are quantised by {method}, which needs a package that is not installed: pip install {package}; "
            "or give the model in bfloat16 or float32"
        )


def bitsandbytes_config(source: str | Path, quantization: Mapping[str, Any]) -> Any:
    from transformers import BitsAndBytesConfig

    if not installed("bitsandbytes"):
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


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing, or a test has put None in its place
        return False
