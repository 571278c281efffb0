"""An adapter on a model: the names that its modules have there, whether it fits, and PEFT's own layers with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..errors import ModelError
from .adapters import Adapter, one_rank, peft_config, state_dict
from .peft_folder import EMBEDDINGS


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
        if (
            weight is None
            or weight.shape != stored.shape
            or not (weight.is_meta or torch.equal(weight.cpu(), stored.to(weight.dtype)))
        ):
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
        if not any(new in modules for new in names.values()):
            names = _of_the_text_model(tuple(adapter.terms), modules) or names
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


def _of_the_text_model(names: tuple[str, ...], modules: dict[str, Any]) -> dict[str, str | None]:
    """Names of an adapter of the text part of a model of text and images, on that part alone, or the other way round; {} where neither fits."""
    ways: tuple[Callable[[str], str], ...] = (
        lambda name: re.sub(r"(^|\.)language_model\.(?=model\.|layers\.)", r"\1", name),
        lambda name: re.sub(r"^model\.(?=layers\.)", "model.language_model.", name),
    )
    for way in ways:
        if all(way(name) in modules for name in names):
            return {name: way(name) for name in names}
    return {}


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
