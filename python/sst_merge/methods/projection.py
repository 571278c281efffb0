"""Layer-wise projection onto the alignment subspace: Safe LoRA, SafeMERGE and SPLoRA.

Both need the alignment direction V = W_aligned − W_unaligned of each module. Here V is the safety adapter's own ΔW, the
only such pair that a merge is given. C = V Vᵀ / ‖V‖_F; a module whose task ΔW agrees little with its projection
C·ΔW counts as unsafe. All products stay in factored form.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import AdapterError
from ..io.adapters import Adapter, LoraTerm
from .base import Inputs, Method, check_strength, joined, per_module, silent, with_task
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


def distances(terms: Mapping[str, LoraTerm], others: Mapping[str, LoraTerm]) -> dict[str, float]:
    """‖CΔW − ΔW‖_F of the modules that both have, C of the other's ΔW, less the mean over modules of its shape, over their interquartile range.

    0 where modules of a shape do not differ.
    """
    plain: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    for name, term in terms.items():
        if name in others:
            projected, a = _projected(term, others[name])[0], term.A.double()
            moved = projected.B.double() - term.scaling * term.B.double()
            plain[term.B.shape[0], term.A.shape[1]][name] = float(((moved.T @ moved) * (a @ a.T)).sum()) ** 0.5
    out = dict[str, float]()
    for group in plain.values():
        values = torch.tensor(list(group.values()), dtype=torch.float64)
        width = float(values.quantile(0.75) - values.quantile(0.25))
        out |= {n: (d - float(values.mean())) / width if width > 0 else 0.0 for n, d in group.items()}
    return out


def _nearest(terms: Mapping[str, LoraTerm], others: Mapping[str, LoraTerm], kept: float) -> dict[str, LoraTerm]:
    """The terms without those of the largest distances: of the modules that both have, the share `kept` stays."""
    found = distances(terms, others)
    order = sorted(found, key=lambda n: (found[n], n))
    dropped = set(order[round(kept * len(order)) :])
    return {n: t for n, t in terms.items() if n not in dropped}


def _splora(inputs: Inputs, strength: float) -> Adapter:
    check_strength(strength, 0.0, 1.0)
    task = _task(inputs)
    terms = _nearest(task.terms, inputs.safety.terms, 1 - strength)
    return joined(inputs, terms) if terms else silent(task)


def _splora_patch(inputs: Inputs, strength: float) -> Adapter:
    check_strength(strength, 0.0, 1.0)
    terms = _nearest(inputs.safety.terms, _task(inputs).terms, strength)
    return with_task(inputs, replace(inputs.safety, terms=terms))


METHODS = [
    Method("safe-lora", "arXiv:2405.16833", "V = ΔW_safety; projects the task adapter, adds no patch", "share of modules projected", SHARES, _safe_lora),
    Method("safe-merge", "arXiv:2503.17239", f"V = ΔW_safety; the {UNSAFE_SHARE:.0%} least aligned modules are averaged with the safety adapter", "weight of safety there", SHARES, _safe_merge),
    Method("splora", "after SPLoRA, TACL 2025, arXiv:2506.18931", "V = ΔW_safety; the task adapter without the modules farthest from their projection, adds no patch; E-DIEM with mean and interquartile range over modules of a shape", "share of modules removed", SHARES, _splora),
    Method("splora-patch", "after SPLoRA, TACL 2025, arXiv:2506.18931", "mirrored: V = ΔW_task; the patch without the modules farthest from their projection, E-DIEM as in splora", "share of modules kept", SHARES, _splora_patch),
]  # fmt: skip
