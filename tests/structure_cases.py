"""Token batches with a float64 loop as their truth, and the structures with the options they are tested in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sst_kernels.fisher.base import Counts, Structure, TokenBatch
from sst_kernels.fisher.structures import make_structure

SHAPE = (3, 5)


@dataclass
class Sample:
    left: torch.Tensor  # [T, p]
    right: torch.Tensor  # [T, q]
    scale: float

    def gradient(self) -> torch.Tensor:
        """vec(scale Σ_t left_t right_tᵀ), token by token in float64."""
        total = torch.zeros(self.left.shape[1], self.right.shape[1], dtype=torch.float64)
        for l, r in zip(self.left.double(), self.right.double(), strict=True):
            total += torch.outer(l, r)
        return (self.scale * total).reshape(-1)


def samples(n: int, shape=SHAPE, *, seed: int = 0, dtype=torch.float32, longest: int = 6) -> list[Sample]:
    """`n` samples of 1 to `longest` tokens with a non-zero mean gradient; the scale is exact in float32."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        length = int(torch.randint(1, longest + 1, (), generator=g))
        left = (torch.randn(length, shape[0], generator=g) + 0.3).to(dtype)
        right = (torch.randn(length, shape[1], generator=g) + 0.2).to(dtype)
        out.append(Sample(left, right, 0.5 + int(torch.randint(0, 4, (), generator=g)) / 4))
    return out


def batch(data: list[Sample], layout: str = "packed", poison: float = 7.0) -> TokenBatch:
    """The samples as one flat batch; `right` and `left` pad to the longest with `poison`."""
    lengths = [len(s.left) for s in data]
    width = max(lengths, default=0)
    lefts, rights, spans, at = [], [], [], 0
    for s, length in zip(data, lengths, strict=True):
        if layout == "packed":
            lefts.append(s.left), rights.append(s.right), spans.append((at, at + length))
            at += length
            continue
        pads = [torch.full((width - length, x.shape[1]), poison, dtype=x.dtype) for x in (s.left, s.right)]
        order = (lambda x, pad: (x, pad)) if layout == "right" else (lambda x, pad: (pad, x))
        lefts.extend(order(s.left, pads[0])), rights.extend(order(s.right, pads[1]))
        begin = at + (width - length if layout == "left" else 0)
        spans.append((begin, begin + length))
        at += width
    return TokenBatch(
        torch.cat(lefts),
        torch.cat(rights),
        torch.tensor(spans, dtype=torch.int64).reshape(-1, 2),
        torch.tensor([s.scale for s in data], dtype=torch.float32),
        Counts(len(data), sum(lengths), sum(max(1, n - 1) for n in lengths)),
    )


def empty_batch(shape=SHAPE) -> TokenBatch:
    return TokenBatch(
        torch.empty(4, shape[0]),
        torch.empty(4, shape[1]),
        torch.empty(0, 2, dtype=torch.int64),
        torch.empty(0),
        Counts(),
    )


def exact(data: list[Sample]) -> torch.Tensor:
    """1/N Σ_n g_n g_nᵀ in float64."""
    rows = torch.stack([s.gradient() for s in data])
    return rows.mT @ rows / len(data)


def first_pass(shape=SHAPE) -> Structure:
    structure = make_structure("kronecker", shape)
    structure.update(batch(samples(20, shape, seed=99)))
    return structure


CASES: dict[str, tuple[str, dict]] = {
    "full": ("full", {}),
    "full-fold": ("full", {"rows": "fold"}),
    "diagonal": ("diagonal", {}),
    "diagonal-centred": ("diagonal", {"centred": True}),
    "kronecker-expand": ("kronecker", {"approx": "expand"}),
    "kronecker-reduce": ("kronecker", {"approx": "reduce"}),
    "kronecker_lowrank": ("kronecker_lowrank", {"rank": 4}),
    "kronecker_lowrank-reduce": ("kronecker_lowrank", {"rank": 2, "approx": "reduce"}),
    "eigen_kronecker": ("eigen_kronecker", {}),
    "kronecker_svd": ("kronecker_svd", {}),
    "kronecker_svd-3": ("kronecker_svd", {"rank": 3, "sketch": 6}),
    "lowrank": ("lowrank", {"rank": 4}),
    "lowrank-exact": ("lowrank", {"rank": 15}),
    "vila": ("vila", {}),
}
LOSSY_MERGE = {"kronecker_svd-3", "lowrank"}


def build(case: str, shape=SHAPE, **options) -> Structure:
    kind, defaults = CASES[case]
    if kind == "eigen_kronecker":
        defaults = {"basis": first_pass(shape)}
    return make_structure(kind, shape, **{**defaults, **options})
