"""SST-Merge in its forms: structures × scopes × filters × evaluation points, and controls that share its machinery."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

import sst_kernels as sst
from sst_kernels.subspace.coordinates import Coordinates

from ..io.adapters import Adapter
from ..merge.algebra import transform
from ..specs import Fishers, Pencil, Strength
from .base import Inputs, Method, check_strength, from_cores, with_task

BUDGETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75)
PATH: tuple[str | float, ...] = ("reference", 0.5, "patched")
_BOTH = ("harm", "benign", "model")
Rule = Literal["soft", "top_k", "threshold"]


def _budget(rule: Rule, change: dict[str, Any], of_fishers: dict[str, Any], inputs: Inputs, strength: float) -> Adapter:
    given = inputs.pencil
    pencil: Pencil = replace(given, **change, fishers=replace(given.fishers, **of_fishers))
    patch, filtered = inputs.require().filtered(pencil, Strength(rule, kl_budget=strength))
    return with_task(inputs, transform(filtered, patch.coordinates))


def _reads_only(inputs: Inputs, strength: float) -> Adapter:
    """The patch with filtered inputs and nothing else."""
    check_strength(strength, 0.0)
    return with_task(inputs, inputs.require().patch(strength))


def _unfiltered(inputs: Inputs) -> Fishers:
    return replace(inputs.pencil.fishers, input_filter=0.0)


def _gain_only(inputs: Inputs, strength: float) -> Adapter:
    """The patch's part in the top eigenvectors of F_harm alone, a share of them; metric: Frobenius norm of ΔW."""
    check_strength(strength, 0.0, 1.0)
    gain = inputs.require().gain(_unfiltered(inputs))
    z = _coordinates(gain)
    rows = z.gradients(gain.rows().cpu())
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    kept = directions[: round(strength * len(directions))]
    return from_cores(inputs, z.to_cores(kept.T @ (kept @ z.patch())))


def _random(inputs: Inputs, strength: float) -> Adapter:
    """The patch's part in random directions of each module, a share of them."""
    check_strength(strength, 0.0, 1.0)
    gain = inputs.require().gain(_unfiltered(inputs))
    z = _coordinates(gain)
    patch, generator = z.patch(), torch.Generator().manual_seed(inputs.seed)
    for where in z.slices.values():
        n = where.stop - where.start
        basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0][
            :, : round(strength * n)
        ]
        patch[where] = basis @ (basis.T @ patch[where])
    return from_cores(inputs, z.to_cores(patch))


def _coordinates(fisher: sst.Fisher) -> Coordinates:
    return Coordinates(list(fisher.blocks.values()), fisher.metric, torch.device("cpu"))


def _form(
    name: str,
    structure: str,
    scope: str,
    points: tuple[str | float, ...] = ("reference",),
    metric: str = "kronecker",
    rule: Rule = "soft",
    weighted: bool = True,
    filtered: bool = True,
    source: str = "ours",
) -> Method:
    where = "along the patch's path" if len(points) > 1 else f"at the {points[0]} point"
    words = "first words weighted" if weighted else "all words alike"
    inputs = "inputs filtered" if filtered else "A as it is"
    variant = f"{inputs}; {structure} Fisher, core space, {scope} scope, {metric} damping, {rule} filter, F_harm {where}, {words}"
    # Rows over all modules serve both scopes; other structures keep what their scope needs.
    of_fishers: dict[str, Any] = {"structure": structure, "options": (), "harm_points": points}
    of_fishers["scope"] = "global" if structure == "full" else scope
    of_fishers |= {} if weighted else {"opening_weight": 1.0}
    of_fishers |= {} if filtered else {"input_filter": 0.0}
    merge = partial(_budget, rule, {"scope": scope, "metric": metric}, of_fishers)
    return Method(name, source, variant, "KL budget, nats per label token", BUDGETS, merge, _BOTH)


METHODS = [
    _form("sst", "full", "global"),
    _form("sst-core", "full", "global", filtered=False),
    Method("input-filter", "after RegMean, arXiv:2212.09849", "A' = A X_harm (X_harm + μ X_benign)⁻¹, the task adapter as it is; no Fisher", "μ, what benign inputs weigh", (100.0, 30.0, 10.0, 3.0, 1.0), _reads_only, _BOTH),
    _form("sst-path", "full", "global", PATH),
    _form("sst-patched", "full", "global", ("patched",)),
    _form("sst-uniform", "full", "global", weighted=False),
    _form("sst-frobenius", "full", "global", metric="frobenius"),
    _form("sst-top-k", "full", "global", rule="top_k"),
    _form("sst-threshold", "full", "global", rule="threshold"),
    _form("sst-module", "full", "module"),
    _form("sst-lowrank", "lowrank", "global"),
    _form("sst-kfac", "kronecker", "module", source="ours, with the factors of arXiv:1503.05671"),
    _form("sst-kpsvd", "kronecker_svd", "module", source="ours, with the factors of arXiv:2201.10285"),
    _form("sst-diagonal", "diagonal", "module"),
    Method("fisher-only", "after AlignGuard-LoRA, arXiv:2508.02079", "merge-time form, ours: top eigenvectors of F_harm (as sst takes it) alone, F_benign ignored", "share of eigenvectors", SHARES, _gain_only, _BOTH),
    Method("random-subspace", "control", "random directions per module in place of the pencil's", "share of directions", SHARES, _random, _BOTH),
]  # fmt: skip
