"""RegMean (Jin et al. 2023, arXiv:2212.09849): least squares on the inputs that each adapter's module sees.

ΔW = (Σ_i w_i ΔW_i G_i) (Σ_i w_i G_i)⁻¹ with G_i = XᵀX on adapter i's own data. The result has the rank of the sum: with
ΔW_i = c_i B_i A_i it is Σ c_i B_i (w_i A_i G_i G⁻¹), so it stays a LoRA adapter, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..io.adapters import Adapter, LoraTerm
from .base import Inputs, Method, per_module
from .task_arithmetic import ALPHAS

OFF_DIAGONAL = 0.9  # the paper's α: off-diagonal entries of the Grams are shrunk by it


def regmean(terms: list[LoraTerm], grams: list[Tensor], weights: list[float]) -> LoraTerm:
    """One module: terms [r_i], grams [d_in, d_in] float64."""
    shrunk = [w * (OFF_DIAGONAL * g + (1 - OFF_DIAGONAL) * torch.diag(g.diagonal())) for g, w in zip(grams, weights)]
    total = sum(shrunk[1:], shrunk[0])
    jitter = torch.finfo(torch.float64).eps * len(total) * total.diagonal().max()
    factor = torch.linalg.cholesky(total + jitter * torch.eye(len(total), dtype=total.dtype))
    parts = [torch.cholesky_solve(g @ t.A.double().T, factor).T for t, g in zip(terms, shrunk)]
    left = torch.cat([t.scaling * t.B.double() for t in terms], 1)
    return LoraTerm(torch.cat(parts).float(), left.float(), 1.0)


def _merge(inputs: Inputs, strength: float) -> Adapter:
    if inputs.task is None:
        from .base import with_task

        return with_task(inputs, inputs.safety, strength)
    grams = [inputs.require().grams(side) for side in ("benign", "harm")]
    sides = [inputs.task.terms, inputs.safety.terms]
    names = {id(t): n for side in sides for n, t in side.items()}

    def rule(terms: list[LoraTerm]) -> LoraTerm:
        name = names[id(terms[0])]
        here = [i for i, side in enumerate(sides) if any(side.get(name) is t for t in terms)]
        if len(here) == 1:
            weight = 1.0 if here[0] == 0 else strength
            return LoraTerm(terms[0].A, weight * terms[0].B, terms[0].scaling)
        return regmean(terms, [g[name] for g in grams], [1.0, strength])

    return per_module(inputs, rule)


METHODS = [
    Method("regmean", "arXiv:2212.09849", f"off-diagonal factor {OFF_DIAGONAL}; benign inputs for task, harmful for safety", "weight of the safety data", ALPHAS, _merge, ("harm", "benign", "model")),
]  # fmt: skip
