"""What a filter of a solved pencil returns."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from sst_kernels.subspace.lora import Lora, put, write

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Prediction:
    """What the filtered patch is expected to cost and to keep. KL divergences are in nats, ½ zᵀ F_cost z.

    held_out: the rows that judge (of the cost for costs, of the gain for `gain_kept`) were in no pencil that chose the patch
    (cross-fitting); False when the structures keep no rows to hold out, and then the figures are optimistic, by orders of magnitude for few rows.
    cost_per_label, cost_per_sequence: of the filtered patch. in_sample_cost_per_label: the same on the pencil's own rows.
    plain_cost_per_label: of the whole patch, by the same quadratic. gain_kept: zᵀF_gain z of the filtered patch over that of
    the whole patch.

    Example:
        >>> prediction = sst.subspace(gain, cost, folds=2).soft(kl_budget=0.01).prediction
        >>> prediction.held_out, prediction.cost_per_label <= 0.01
        (True, True)
    """

    held_out: bool
    cost_per_label: float
    cost_per_sequence: float
    in_sample_cost_per_label: float
    plain_cost_per_label: float
    gain_kept: float


@dataclass(frozen=True)
class Patch:
    """A filtered patch: ΔW' = scaling · B S' A with S' = coordinates[module] [r, r] (float64; I would be the whole patch).

    filter: "soft", "top_k" or "threshold"; parameter: its μ, infinite where a budget keeps nothing, or k. kept: per module ‖ΔW'‖²_F / ‖ΔW‖²_F; above 1
    where the filter moves cheap directions further to make up for dear ones. lora: the factors that S' stands between, which a pencil
    made from `Evidence` knows and one made from Fishers does not.

    Example:
        >>> patch = sst.subspace(gain, cost, folds=2).soft(kl_budget=0.01)
        >>> patch.coordinates["model.layers.0.self_attn.q_proj"].shape
        torch.Size([3, 3])
        >>> patch = evidence.subspace().soft(kl_budget=0.02)  # doctest: +SKIP
        >>> patch.apply(model)                                # the adapter on the model becomes the filtered patch  # doctest: +SKIP
        >>> patch.save("patch")                               # a PEFT adapter of its own  # doctest: +SKIP
    """

    coordinates: dict[str, Tensor]
    filter: str
    parameter: float
    prediction: Prediction
    kept: dict[str, float]
    scope: str
    points: tuple[str, str]
    lora: Lora | None = field(default=None, repr=False)

    def factors(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Per module A' [r, d_in], B S' [d_out, r] (float32, CPU) and c, with ΔW' = c · B S' A'. ValueError without `lora`."""
        if self.lora is None:
            raise ValueError(
                "this patch comes from Fishers, which keep no adapter: make the pencil with Evidence, whose patches know their factors, or use "
                "`coordinates`: ΔW' = c · B S' A"
            )
        return self.lora.at(self.coordinates)

    def apply(self, model: Model, adapter: str | None = None) -> Model:
        """Put the filtered patch in place of the adapter that was read on a PEFT model, and return the model; a second time changes nothing.

        adapter: its name there, by default the one it was read under. Modules that the pencil left out stay as they are.
        Raises ValueError without `lora`, and for a model that carries another adapter, before anything is changed.
        """
        put(self.factors(), model, adapter or self.lora.adapter)  # type: ignore[union-attr]
        return model

    def save(self, folder: str | os.PathLike, base_model: str = "") -> Path:
        """Write the filtered patch as a PEFT adapter folder, and return its path.

        base_model: folder or name of the model, for `AutoPeftModel`. Raises ValueError without `lora`, FileExistsError where an adapter is.
        """
        return write(self.factors(), folder, base_model)

    @property
    def strength(self) -> float | None:
        """`parameter`, or None for the infinite μ of an empty patch: JSON has no infinity."""
        return self.parameter if isfinite(self.parameter) else None
