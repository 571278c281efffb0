"""The LoRA factors that a patch is coordinates of: put them on a model, write them as a PEFT adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Lora:
    """Per module A [r, d_in], B [d_out, r] (float32, CPU) and the scaling c of ΔW(S) = c · B S A, under an adapter's name."""

    adapter: str
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    scaling: Mapping[str, float]

    def at(self, coordinates: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, float]]:
        """(A, B S, c) per module for core coordinates S [r, r], in float32."""
        return {
            name: (self.a[name], (self.b[name].double() @ s.cpu().double()).float(), self.scaling[name])
            for name, s in coordinates.items()
        }


def put(factors: Mapping[str, tuple[Tensor, Tensor, float]], model: nn.Module, adapter: str) -> None:
    """Copy LoRA factors into the layers of `adapter` on a PEFT model, in place.

    Raises ValueError, before anything is changed, for modules that do not carry the adapter, carry it merged, or with other shapes or scalings.
    """
    layers = {
        path.removeprefix("base_model.model."): layer
        for path, layer in model.named_modules()
        if adapter in getattr(layer, "lora_A", {})
    }
    for name, (a, b, scaling) in factors.items():
        if name not in layers:
            where = f"{next(iter(layers))} and {len(layers) - 1} more" if layers else "no module of this model"
            raise ValueError(f"{name} does not carry the adapter {adapter!r}; it is on {where}")
        layer = layers[name]
        found = tuple(layer.lora_A[adapter].weight.shape), tuple(layer.lora_B[adapter].weight.shape)
        if found != (tuple(a.shape), tuple(b.shape)) or layer.scaling[adapter] != scaling:
            raise ValueError(
                f"{name}: the patch has A {tuple(a.shape)}, B {tuple(b.shape)} and scaling {scaling:g}, the model's adapter {adapter!r} "
                f"{found[0]}, {found[1]} and {layer.scaling[adapter]:g}: it is another adapter"
            )
        if adapter in getattr(layer, "merged_adapters", ()):
            raise ValueError(f"{name}: {adapter!r} is merged into the base weight; call model.unmerge_adapter() first")
    with torch.no_grad():
        for name, (a, b, _) in factors.items():
            layers[name].lora_A[adapter].weight.copy_(a)
            layers[name].lora_B[adapter].weight.copy_(b)


def write(factors: Mapping[str, tuple[Tensor, Tensor, float]], folder: str | os.PathLike, base_model: str = "") -> Path:
    """Write LoRA factors as a PEFT adapter: one rank by zero rows, alpha = r, no patterns, so that every server scales it rightly.

    Raises FileExistsError where the folder holds an adapter.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise FileExistsError(f"{folder}: holds an adapter; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    rank = max(a.shape[0] for a, _, _ in factors.values())
    state = {}
    for name, (a, b, scaling) in factors.items():
        more = rank - a.shape[0]
        state[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, more)).contiguous()
        state[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(scaling * b, (0, more)).contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": rank, "lora_alpha": rank,
        "target_modules": list(factors), "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder
