"""What a filter of a solved pencil returns."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from torch import Tensor


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
    where the filter moves cheap directions further to make up for dear ones.

    Example:
        >>> patch = sst.subspace(gain, cost, folds=2).soft(kl_budget=0.01)
        >>> patch.coordinates["model.layers.0.self_attn.q_proj"].shape
        torch.Size([3, 3])
    """

    coordinates: dict[str, Tensor]
    filter: str
    parameter: float
    prediction: Prediction
    kept: dict[str, float]
    scope: str
    points: tuple[str, str]

    @property
    def strength(self) -> float | None:
        """`parameter`, or None for the infinite μ of an empty patch: JSON has no infinity."""
        return self.parameter if isfinite(self.parameter) else None
