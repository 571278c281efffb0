"""Objects that somebody else holds, as a merge reads them: loaded models, adapters on them, rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import AdapterError, DataError, ModelError
from .adapters import Adapter, write_adapter


def bare(model: Any) -> Any:
    """A model that shares the weights of `model` and can be changed without changing that: no LoRA layers, nothing trainable, evaluation mode.

    Raises ModelError for what is no causal language model of transformers, and where an adapter is merged into the weights.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ModelError(
            f"model: expected a path, or a causal language model of transformers, got {type(model).__name__}"
        )
    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False) if type(p) is nn.Parameter else p
    own: Any = copy.deepcopy(model, memo)
    own = own.get_base_model() if hasattr(own, "get_base_model") else own
    for name, layer in list(own.named_modules()):
        if not (hasattr(layer, "base_layer") and hasattr(layer, "lora_A")):
            continue
        if getattr(layer, "merged", False):
            raise ModelError(f"model: an adapter is merged into the weights of {name}; call unmerge_adapter() first")
        parent, _, last = name.rpartition(".")
        setattr(own.get_submodule(parent), last, layer.base_layer)
    for mark in ("peft_config", "_hf_peft_config_loaded"):  # of transformers' own load_adapter
        if mark in vars(own):
            delattr(own, mark)
    return own.requires_grad_(False).eval()


def adapter_at(given: Any, name: str, model: Any, folder: Path) -> Path:
    """The folder of an adapter that is given as a path, as `Adapter`, as a PeftModel with one active adapter, or by the name that it has on
    `model`; written to `folder` where it is none. Raises AdapterError."""
    on_model = getattr(model, "peft_config", {})
    if isinstance(given, str) and given in on_model and not Path(given).exists():
        return _saved(model, given, folder)
    if isinstance(given, str | Path):
        return Path(given)
    if isinstance(given, Adapter):
        folder.mkdir(parents=True)
        write_adapter(given, folder)
        return folder
    active = list(getattr(given, "active_adapters", []) if hasattr(given, "peft_config") else [])
    if len(active) != 1:
        what = f"a PeftModel whose active adapters are {active}" if active else type(given).__name__
        raise AdapterError(
            f"{name}: expected an adapter's folder, a PeftModel with one active adapter, or its name on the model, got {what}"
        )
    return _saved(given, active[0], folder)


def _saved(model: Any, adapter: str, folder: Path) -> Path:
    model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False)
    return folder if adapter == "default" else folder / adapter


def rows_at(given: Any, name: str, file: Path) -> Path:
    """The path of data that are given as one, or as rows (mappings), which are written to `file`. Raises DataError."""
    if isinstance(given, str | Path):
        return Path(given)
    rows = list(given) if isinstance(given, Iterable) and not isinstance(given, Mapping) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(
            f"{name}: expected a path, or rows such as {{'prompt': …, 'response': …}}, got {type(given).__name__}"
        )
    try:
        file.write_text("".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: rows of text are expected ({error})") from error
    return file
