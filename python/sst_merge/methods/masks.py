"""Elementwise methods in factor space (entries of A and B): they depend on the gauge of the adapter, as published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from sst_kernels.fisher import Fisher
from sst_kernels.fisher.base import Structure
from sst_kernels.fisher.structures import Diagonal, Vila
from sst_kernels.fisher.structures.vila import select_top, vila_ratio

from ..io.adapters import Adapter, LoraTerm
from ..specs import Fishers
from .base import Inputs, Method, check_strength, with_task
from .sst import SHARES

_NEEDS = ("harm", "benign", "model")
_DAMPING = 1e-8
BENIGN_SHARE = 0.1  # LED: of entries that benign answers claim

S = TypeVar("S", bound=Structure)


def _masked(inputs: Inputs, weigh: Callable[[str, LoraTerm], tuple[Tensor, Tensor]]) -> Adapter:
    terms = {}
    for name, term in inputs.safety.terms.items():
        on_a, on_b = weigh(name, term)
        terms[name] = LoraTerm((term.A.double() * on_a).float(), (term.B.double() * on_b).float(), term.scaling)
    return with_task(inputs, replace(inputs.safety, terms=terms))


def _factors(fisher: Fisher, name: str, kind: type[S]) -> tuple[S, S]:
    """What a factor-space Fisher holds of a module's A and B."""
    a, b = (fisher[f"{name}.lora_{side}"] for side in "AB")
    if not (isinstance(a, kind) and isinstance(b, kind)):
        raise TypeError(f"{name}: expected {kind.kind} structures, got {a.kind} and {b.kind}")
    return a, b


def of_factors(structure: str) -> Fishers:
    """Per factor A and B of the patch as it is: refusals at the patched point, benign answers at the reference."""
    return Fishers(0.0, 1.0, structure, space="factor", harm_points=("patched",))


def _diagonals(inputs: Inputs) -> Callable[[str], list[tuple[Tensor, Tensor]]]:
    """Per module, for A and B: (F_harm, F_benign) of the entries."""
    gain, cost = inputs.require().fishers(of_factors("diagonal"))

    def of(name: str) -> list[tuple[Tensor, Tensor]]:
        sides = zip(_factors(gain, name, Diagonal), _factors(cost, name, Diagonal))
        return [(harm.diagonal().cpu(), benign.diagonal().cpu()) for harm, benign in sides]

    return of


def _diagonal_sst(inputs: Inputs, strength: float) -> Adapter:
    """Keep the share `strength` of all entries with the largest λ = F_harm / F_benign."""
    check_strength(strength, 0.0, 1.0)
    diagonals = _diagonals(inputs)
    names = list(inputs.safety.terms)
    floor = _DAMPING * max(float(c.max()) for n in names for _, c in diagonals(n))
    ratios = {n: [h / (b + floor) for h, b in diagonals(n)] for n in names}
    mask = select_top(torch.cat([r.flatten() for n in names for r in ratios[n]]), strength)
    sizes = [r.numel() for n in names for r in ratios[n]]
    parts = iter(mask.split(sizes))
    kept = {n: tuple(next(parts).reshape(r.shape) for r in ratios[n]) for n in names}
    return _masked(inputs, lambda name, term: kept[name])


def _fisher_average(inputs: Inputs, strength: float) -> Adapter:
    """Fisher-weighted mean of patch (F_harm) and no patch (F_benign): entries times F_h / (F_h + F_b (1 − s)/s)."""
    check_strength(strength, 0.0, 1.0)
    if strength == 0:
        return with_task(inputs, inputs.safety, 0.0)
    diagonals, rest = _diagonals(inputs), (1 - strength) / strength

    def weigh(name: str, term: LoraTerm) -> tuple[Tensor, Tensor]:
        a, b = (h / (h + rest * c).clamp_min(torch.finfo(torch.float64).tiny) for h, c in diagonals(name))
        return a, b

    return _masked(inputs, weigh)


def _vila(inputs: Inputs, strength: float) -> Adapter:
    """Keep the output rows of each module (rows of B) with the largest harm-to-benign ratio of VILA importances."""
    check_strength(strength, 0.0, 1.0)
    harm, benign = inputs.require().fishers(of_factors("vila"))

    def weigh(name: str, term: LoraTerm) -> tuple[Tensor, Tensor]:
        ratio = vila_ratio(_factors(harm, name, Vila), _factors(benign, name, Vila))
        rows = select_top(ratio.cpu(), strength)
        return torch.ones(1, dtype=torch.float64), rows.double()[:, None]

    return _masked(inputs, weigh)


def led_mask(scores: tuple[Tensor, Tensor, Tensor], share: float) -> Tensor:
    """Located, elected, disjoint: among the top `share` by both harmful scores, and not among the top `BENIGN_SHARE` by the benign one."""
    reference, patched, benign = scores
    return select_top(reference, share) & select_top(patched, share) & ~select_top(benign, BENIGN_SHARE)


def _led(inputs: Inputs, strength: float) -> Adapter:
    """Importance |θ| √E[g²] of the entries of A and of B, each matrix by itself."""
    check_strength(strength, 0.0, 1.0)
    spec = of_factors("diagonal")
    patched, benign = inputs.require().fishers(spec)
    fishers = (inputs.require().gain(replace(spec, harm_points=("reference",))), patched, benign)

    def weigh(name: str, term: LoraTerm) -> tuple[Tensor, Tensor]:
        sides = [_factors(fisher, name, Diagonal) for fisher in fishers]
        masks = []
        for weight, own in zip((term.A, term.B), zip(*sides)):
            one, two, three = (weight.double().abs() * d.diagonal().cpu().double().sqrt() for d in own)
            masks.append(led_mask((one, two, three), strength).double())
        return masks[0], masks[1]

    return _masked(inputs, weigh)


METHODS = [
    Method("diagonal-sst", "public SST-Merge implementations", "elementwise λ mask on A and B, empirical and model-sampled diagonal Fishers", "share of entries", SHARES, _diagonal_sst, _NEEDS),
    Method("fisher-average", "arXiv:2111.09832", "diagonal Fisher-weighted mean with the unpatched model, entries of A and B", "weight of the patch", SHARES, _fisher_average, _NEEDS),
    Method("sst-vila", "ours, with the importances of arXiv:2508.21300", "output rows by harm/benign ratio", "share of rows", SHARES, _vila, _NEEDS),
    Method("led", "after LED-Merging, arXiv:2502.16770", f"entries of A and B by |θ|·√E[g²] per matrix: in the top share on refusals at the reference and at the patched point, and not in the top {BENIGN_SHARE:.0%} on benign answers; the task adapter whole", "share of entries by each score", (*SHARES, 1.0), _led, _NEEDS),
]  # fmt: skip
