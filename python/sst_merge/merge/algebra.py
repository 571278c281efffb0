"""Exact arithmetic on LoRA adapters: weighted sums, the core transform, and recompression with its error.

A weighted sum Σ w_i c_i B_i A_i is one LoRA term whose factors are concatenated: no dense ΔW is ever formed, and the
result is exact up to the rounding of w·c·B to float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError
from ..io.adapters import Adapter, LoraTerm


@dataclass(frozen=True)
class Recompression:
    """What recompression lost: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all modules, and in the worst one."""

    rank: int
    relative_error: float
    worst_module: str
    worst_error: float

    def summary(self) -> dict[str, Any]:
        return asdict(self)


def concatenate(parts: Sequence[tuple[float, Adapter]]) -> Adapter:
    """The adapter of Σ weight · ΔW over all modules of all parts; parts of weight 0 are left out.

    Raises:
        AdapterError: nothing is left to add, the parts disagree on a module's shape, or a weight is not finite.
    """
    if not all(math.isfinite(weight) for weight, _ in parts):
        raise AdapterError(f"weights of a merge must be finite, got {[weight for weight, _ in parts]}")
    used = [(weight, adapter) for weight, adapter in parts if weight != 0]
    if not used:
        raise AdapterError("nothing to merge: every adapter has weight 0")
    modules = sorted({name for _, adapter in used for name in adapter.terms})
    terms = {name: _join(name, [(w, a.terms[name]) for w, a in used if name in a.terms]) for name in modules}
    if not terms:
        raise AdapterError("nothing is left to merge: the filter removed the whole patch; allow a larger KL budget")
    bases = sorted({adapter.base_model for _, adapter in used if adapter.base_model})
    notes = (f"the adapters name different base models: {', '.join(bases)}",) if len(bases) > 1 else ()
    return Adapter(
        terms,
        base_model=bases[0] if bases else "",
        fan_in_fan_out=any(adapter.fan_in_fan_out for _, adapter in used),  # PEFT asks each layer, too
        notes=notes,
        experts=frozenset().union(*(adapter.experts for _, adapter in used)),
    )


def transform(adapter: Adapter, coordinates: Mapping[str, Tensor]) -> Adapter:
    """The adapter with ΔW = scaling · B S A, where S [r, r] = `coordinates[module]`.

    Modules without an S, or with S = 0, are left out: they carry no change.

    Raises:
        AdapterError: a module that the adapter does not have, or an S of another shape.
    """
    terms = {}
    for name, S in coordinates.items():
        if name not in adapter.terms or tuple(S.shape) != (adapter.terms[name].rank,) * 2:
            have = adapter.terms[name].rank if name in adapter.terms else "no such module"
            raise AdapterError(f"core coordinates of {name}: got shape {tuple(S.shape)}, the adapter has rank {have}")
        term = adapter.terms[name]
        if S.any():
            terms[name] = LoraTerm(term.A, (term.B.double() @ S.to("cpu", torch.float64)).float(), term.scaling)
    return replace(adapter, terms=terms)


def with_lora_A(adapter: Adapter, reads: Mapping[str, Tensor]) -> Adapter:
    """The adapter with A [r, d_in] replaced by `reads[module]`; modules without any are left out."""
    terms = {name: replace(adapter.terms[name], A=a.cpu()) for name, a in reads.items()}
    return replace(adapter, terms=terms)


def recompress(adapter: Adapter, rank: int) -> tuple[Adapter, Recompression]:
    """The best adapter of at most `rank` per module (truncated SVD of ΔW in Frobenius norm), and what was lost.

    Two thin QR factorisations and one r×r SVD per module; modules whose rank fits already stay as they are.
    """
    if rank < 1:
        raise AdapterError(f"recompression rank: expected at least 1, got {rank}")
    terms, lost, total = {}, {}, {}
    for name, term in adapter.terms.items():
        left, left_core = torch.linalg.qr(term.scaling * term.B.double())
        right, right_core = torch.linalg.qr(term.A.double().T)
        u, s, vh = torch.linalg.svd(left_core @ right_core.T)
        total[name], lost[name] = float(s.square().sum()), float(s[rank:].square().sum())
        if term.rank <= rank:
            terms[name], lost[name] = term, 0.0
            continue
        root = s[:rank].sqrt()
        terms[name] = LoraTerm(
            (root[:, None] * (vh[:rank] @ right.T)).float(), ((left @ u[:, :rank]) * root).float(), 1.0
        )
    relative = {name: math.sqrt(lost[name] / total[name]) if total[name] else 0.0 for name in terms}
    worst = max(relative, key=relative.__getitem__)
    whole = sum(total.values())
    error = math.sqrt(sum(lost.values()) / whole) if whole else 0.0
    return replace(adapter, terms=terms), Recompression(rank, error, worst, relative[worst])


def inner(one: Adapter, other: Adapter) -> dict[str, float]:
    """⟨ΔW, ΔW'⟩_F of every module that both change, from r×r products; of an adapter with itself the squared norms."""
    products = {}
    for name in one.terms.keys() & other.terms.keys():
        a, b = one.terms[name], other.terms[name]
        left, right = a.B.double().T @ b.B.double(), a.A.double() @ b.A.double().T
        products[name] = a.scaling * b.scaling * float((left * right).sum())
    return products


def _join(name: str, parts: list[tuple[float, LoraTerm]]) -> LoraTerm:
    shapes = {(term.B.shape[0], term.A.shape[1]) for _, term in parts}
    if len(shapes) > 1:
        raise AdapterError(f"{name}: the adapters change weights of shapes {sorted(shapes)}: different base models")
    A = torch.cat([term.A.float() for _, term in parts])
    B = torch.cat([(weight * term.scaling * term.B.double()).float() for weight, term in parts], dim=1)
    return LoraTerm(A, B, 1.0)
