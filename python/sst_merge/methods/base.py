"""What a merging method is: adapters (and, for some, data) in, one adapter out, under one number that sets its strength."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import AdapterError, MergeError
from ..io.adapters import Adapter, LoraTerm
from ..merge.algebra import concatenate, recompress, transform
from ..specs import Pencil

if TYPE_CHECKING:
    from ..merge.source import Source


@dataclass
class Inputs:
    """What every method is given.

    rank: rank at which methods that work on the dense ΔW export it; None exports the whole numerical rank, exactly.
    source: evidence, Fishers and activations on the fitting data, for methods with `needs`. pencil: what they take where a method does
    not say otherwise.
    """

    task: Adapter | None
    safety: Adapter
    source: Source | None = None
    pencil: Pencil = field(default_factory=Pencil)
    rank: int | None = None
    seed: int = 0

    def require(self) -> Source:
        if self.source is None:
            raise MergeError("this method looks at data: give the comparison harm_data and benign_data")
        return self.source


@dataclass(frozen=True)
class Method:
    """One merging method.

    source: where it is published (or "ours"). variant: what exactly is computed here, where there is a choice.
    strength: what the number means. strengths: the default sweep. needs: "harm", "benign" (data) or "model".
    merge(inputs, strength): the merged adapter, exact in the ΔW that the method defines.
    """

    name: str
    source: str
    variant: str
    strength: str
    strengths: tuple[float, ...]
    merge: Callable[[Inputs, float], Adapter]
    needs: tuple[str, ...] = field(default=())


def with_task(inputs: Inputs, patch: Adapter, weight: float = 1.0) -> Adapter:
    """task + weight · patch, by concatenation."""
    parts = [(1.0, inputs.task)] if inputs.task is not None else []
    parts += [(weight, patch)] if patch.terms and weight else []
    if not parts:
        return silent(inputs.safety)
    return concatenate(parts)


def from_cores(inputs: Inputs, cores: Mapping[str, Tensor]) -> Adapter:
    """task + c · B S A of the safety adapter."""
    return with_task(inputs, transform(inputs.safety, cores))


def silent(adapter: Adapter) -> Adapter:
    """An adapter of the same modules whose ΔW is zero."""
    name, term = next(iter(adapter.terms.items()))
    zero = LoraTerm(term.A[:1].clone(), torch.zeros_like(term.B[:, :1]), 1.0)
    return Adapter({name: zero}, base_model=adapter.base_model, fan_in_fan_out=adapter.fan_in_fan_out)


def densely(inputs: Inputs, rule: Callable[[list[Tensor]], Tensor]) -> Adapter:
    """Apply `rule` to [ΔW_task, ΔW_safety] of every module (float64, zeros where an adapter has none) and export the result."""
    task = inputs.task.terms if inputs.task is not None else {}
    terms = {}
    for name in sorted({*task, *inputs.safety.terms}):
        pair = [source[name].delta() if name in source else None for source in (task, inputs.safety.terms)]
        shape = next(p.shape for p in pair if p is not None)
        terms[name] = factored(rule([p if p is not None else torch.zeros(shape, dtype=torch.float64) for p in pair]))
    whole = _like(inputs, terms)
    if inputs.rank is None:
        return whole
    smaller, lost = recompress(whole, inputs.rank)
    note = f"exported at rank {inputs.rank}: ‖ΔW − ΔW'‖/‖ΔW‖ = {lost.relative_error:.3g}"
    return Adapter(smaller.terms, smaller.base_model, smaller.fan_in_fan_out, notes=(*smaller.notes, note))


def factored(delta: Tensor) -> LoraTerm:
    """A dense ΔW [d_out, d_in] as a LoRA term of its numerical rank (at least 1)."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    rank = max(1, int((s > s[0] * max(delta.shape) * torch.finfo(s.dtype).eps).sum())) if len(s) else 1
    root = s[:rank].sqrt()
    return LoraTerm((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float(), 1.0)


def per_module(inputs: Inputs, rule: Callable[[list[LoraTerm]], LoraTerm]) -> Adapter:
    """Apply `rule` to the LoRA terms of every module, task first; a term stands alone where only one adapter has it."""
    task = inputs.task.terms if inputs.task is not None else {}
    names = sorted({*task, *inputs.safety.terms})
    terms = {n: rule([source[n] for source in (task, inputs.safety.terms) if n in source]) for n in names}
    return _like(inputs, terms)


def thin_svd(terms: list[LoraTerm], weights: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, R], σ [R], Vᵀ [R, d_in] of Σ w·ΔW in float64, R = Σ r: no zero directions of the full space can enter."""
    left = torch.cat([w * t.scaling * t.B.double() for w, t in zip(weights, terms)], 1)
    right = torch.cat([t.A.double() for t in terms])
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    live = s > (s[0] * len(s) * torch.finfo(s.dtype).eps * 8 if len(s) else 0)
    return (q_left @ u)[:, live], s[live], (vh @ q_right.T)[live]


def as_term(u: Tensor, s: Tensor, vh: Tensor) -> LoraTerm:
    """The term U diag(s) Vᵀ, its size split evenly between the factors."""
    if not len(s):
        return LoraTerm(torch.zeros(1, vh.shape[1]), torch.zeros(u.shape[0], 1), 1.0)
    root = s.sqrt()
    return LoraTerm((root[:, None] * vh).float(), (u * root).float(), 1.0)


def weights_of(inputs: Inputs, terms: list[LoraTerm], name: str, strength: float) -> list[float]:
    """1 for the task's term, the strength for the safety adapter's."""
    own = inputs.safety.terms.get(name)
    return [strength if t is own else 1.0 for t in terms]


def check_strength(strength: float, low: float = 0.0, high: float = math.inf) -> None:
    if not low <= strength <= high:
        raise AdapterError(f"strength: expected a number in {low:g} … {high:g}, got {strength}")


def _like(inputs: Inputs, terms: dict[str, LoraTerm]) -> Adapter:
    task = inputs.task
    base = (task.base_model if task is not None else "") or inputs.safety.base_model
    return Adapter(terms, base_model=base, fan_in_fan_out=inputs.safety.fan_in_fan_out)
