"""Layer-wise projection onto the alignment subspace: Safe LoRA and SafeMERGE.

Both need the alignment direction V = W_aligned − W_unaligned of each module. Here V is the safety adapter's own ΔW, the
only such pair that a merge is given. C = V Vᵀ / ‖V‖_F; a module whose task ΔW agrees little with its projection
C·ΔW counts as unsafe. All products stay in factored form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import AdapterError
from ..io.adapters import Adapter, LoraTerm
from .base import Inputs, Method, per_module
from .sst import SHARES

UNSAFE_SHARE = 0.5  # SafeMERGE: share of modules, least aligned first, that are merged


def _projected(task: LoraTerm, safety: LoraTerm) -> tuple[LoraTerm, float]:
    """C·ΔW_task as a term, and its cosine with ΔW_task."""
    b, a = safety.scaling * safety.B.double(), safety.A.double()
    norm = ((b.T @ b) * (a @ a.T)).sum().sqrt()
    left = b @ ((a @ a.T) @ (b.T @ (task.scaling * task.B.double()))) / norm
    projected = LoraTerm(task.A, left.float(), 1.0)
    return projected, _cosine(left, task.scaling * task.B.double(), task.A.double())


def _cosine(left: Tensor, right: Tensor, a: Tensor) -> float:
    metric = a @ a.T
    dot, one, two = (float(((x.T @ y) * metric).sum()) for x, y in ((left, right), (left, left), (right, right)))
    return dot / (one * two) ** 0.5 if one * two else 0.0


def _task(inputs: Inputs) -> Adapter:
    if inputs.task is None:
        raise AdapterError("projection methods change the task adapter: give one")
    return inputs.task


def _unsafe(task: Adapter, safety: Adapter, share: float) -> dict[str, LoraTerm]:
    """The least aligned share of the modules that both adapters have, with their projections."""
    both = {n: _projected(t, safety.terms[n]) for n, t in task.terms.items() if n in safety.terms}
    order = sorted(both, key=lambda n: both[n][1])
    return {n: both[n][0] for n in order[: round(share * len(order))]}


def _safe_lora(inputs: Inputs, strength: float) -> Adapter:
    task = _task(inputs)
    unsafe = _unsafe(task, inputs.safety, strength)
    terms = {n: unsafe.get(n, t) for n, t in task.terms.items()}
    return Adapter(terms, base_model=task.base_model, fan_in_fan_out=task.fan_in_fan_out)


def _safe_merge(inputs: Inputs, strength: float) -> Adapter:
    task = _task(inputs)
    unsafe = _unsafe(task, inputs.safety, UNSAFE_SHARE)
    names = {id(t): n for n, t in task.terms.items()}

    def rule(terms: list[LoraTerm]) -> LoraTerm:
        name = names.get(id(terms[0]))
        if name is None or name not in unsafe:
            keep = terms[0]
            return keep if name is not None else LoraTerm(keep.A[:1] * 0, keep.B[:, :1] * 0, 1.0)
        weights = (1 - strength, strength)
        left = torch.cat([w * t.scaling * t.B.double() for w, t in zip(weights, terms)], 1)
        return LoraTerm(torch.cat([t.A.float() for t in terms]), left.float(), 1.0)

    return per_module(inputs, rule)


METHODS = [
    Method("safe-lora", "arXiv:2405.16833", "V = ΔW_safety; projects the task adapter, adds no patch", "share of modules projected", SHARES, _safe_lora),
    Method("safe-merge", "arXiv:2503.17239", f"V = ΔW_safety; the {UNSAFE_SHARE:.0%} least aligned modules are averaged with the safety adapter", "weight of safety there", SHARES, _safe_merge),
]  # fmt: skip
