"""Spans: which tokens of a flat batch [S, ·] belong to which sample.

`spans` [N, 2] int64 holds one half-open token range per sample. Right- or left-padded dense batches and packed ones
(`cu_seqlens`) differ in nothing but their spans; tokens outside every span are padding and never reach a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sst_kernels.memo import Memo

# Elements of a batched temporary of the CPU forms: 1 MiB of float32, what a core's second-level cache holds.
CACHED_ELEMENTS = 1 << 18
# Tokens from which on a product of its own costs less than gathering them into a larger one.
SEGMENT_TOKENS = 32


def spans_from_lengths(
    N: int,
    T: int,
    lengths: Tensor | None = None,
    padding: str = "right",
    device: torch.device | str | None = None,
) -> Tensor:
    """Spans [N, 2] of a dense batch [N, T, ·] laid out flat.

    `lengths` [N] counts the real tokens of each sample (None: all T); `padding` says on which side the others are.
    Nothing is copied to the host, so lengths on a GPU cost no synchronisation and are not range-checked there.

    Raises ValueError for another `padding`, a wrong number of lengths, or (on the CPU) lengths outside [0, T].
    """
    if padding not in ("right", "left"):
        raise ValueError(f'padding: expected "right" or "left", got {padding!r}')
    if device is None:
        device = "cpu" if lengths is None else lengths.device
    start = torch.arange(N, dtype=torch.int64, device=device) * T
    if lengths is None:
        return torch.stack([start, start + T], 1)
    if lengths.shape != (N,):
        raise ValueError(f"lengths: expected shape [{N}], one per sample, got {list(lengths.shape)}")
    if lengths.device.type == "cpu" and N and (int(lengths.min()) < 0 or int(lengths.max()) > T):
        raise ValueError(f"lengths: expected values in [0, T={T}], got {int(lengths.min())}..{int(lengths.max())}")
    lengths = lengths.to(device, torch.int64)
    if padding == "right":
        return torch.stack([start, start + lengths], 1)
    return torch.stack([start + T - lengths, start + T], 1)


def spans_from_cu_seqlens(cu: Tensor) -> Tensor:
    """Spans [N, 2] of a packed batch from its cumulative lengths [N + 1], as varlen attention takes them."""
    if cu.ndim != 1 or len(cu) == 0:
        raise ValueError(f"cu_seqlens: expected shape [N + 1] with a leading 0, got {list(cu.shape)}")
    cu = cu.to(torch.int64)
    return torch.stack([cu[:-1], cu[1:]], 1)


class Run(NamedTuple):
    """Consecutive samples [first, last) of one length, their tokens `step` apart: one batched product without a copy."""

    first: int
    last: int
    begin: int
    step: int
    length: int
    scale: Tensor | None  # [last - first, 1, 1]

    def windows(self, x: Tensor) -> Tensor:
        """The tokens of each sample, [S, d] to a view [m, d, length]."""
        return x[self.begin : self.begin + (self.last - self.first - 1) * self.step + self.length].unfold(
            0, self.length, self.step
        )

    def pieces(self, elements: int) -> Iterator[Run]:
        """The run in parts of which the gradients, `elements` each, fit a second-level cache together."""
        most = max(1, CACHED_ELEMENTS // elements)
        if self.last - self.first <= most:
            yield self
            return
        for first in range(self.first, self.last, most):
            last, at = min(first + most, self.last), first - self.first
            scale = None if self.scale is None else self.scale[at : at + most]
            yield Run(first, last, self.begin + at * self.step, self.step, self.length, scale)


class Layout(NamedTuple):
    """What the CPU forms want to know of spans: the samples that have tokens, in runs, and the numbers of those that have none."""

    runs: list[Run]
    empty: list[int]
    segments: list[
        tuple[int, int, float]
    ]  # (begin, end, weight Σ scale²) of tokens; adjoining ones of one weight are one


_last_layouts = {False: Memo(), True: Memo()}  # one for scaled sides, one for unscaled: modules ask for them in turn


def layout(S: int, spans: Tensor, scale: Tensor | None) -> Layout:
    """The `Layout` of a batch on the CPU, kept for the next call. ValueError for spans outside [0, S]."""
    last = _last_layouts[scale is not None]
    if last.holds(S, spans, scale):
        return last.value
    if spans.numel():
        low, high = (int(x) for x in spans.aminmax())
        if low < 0 or high > S:
            raise ValueError(f"spans: expected token ranges inside [0, {S}], got {low}..{high}")
    ranges = spans.tolist()
    weights = [1.0] * len(ranges) if scale is None else scale.double().square().tolist()
    segments: list[tuple[int, int, float]] = []
    for (begin, end), weight in zip(ranges, weights):
        if begin < end:
            if segments and segments[-1][1:] == (begin, weight):
                begin = segments.pop()[0]
            segments.append((begin, end, weight))
    empty = [n for n, (begin, end) in enumerate(ranges) if begin >= end]
    return last.keep(Layout(list(_runs(ranges, scale)), empty, segments), S, spans, scale)


def _runs(ranges: list[list[int]], scale: Tensor | None) -> Iterator[Run]:
    first = 0
    while first < len(ranges):
        (begin, end), last = ranges[first], first + 1
        step = ranges[last][0] - begin if last < len(ranges) else 0
        while step > 0 and last < len(ranges) and ranges[last] == [x + (last - first) * step for x in (begin, end)]:
            last += 1
        if begin < end:
            s = None if scale is None else scale[first:last, None, None]
            yield Run(first, last, begin, step if last - first > 1 else end - begin, end - begin, s)
        first = last


def gradients(run: Run, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """CPU form of G_n = scale_n Σ_t left_t right_tᵀ of a run, [m, p, q] float32, in `out` where that is given."""
    a, b = run.windows(left), run.windows(right)
    p, q = a.shape[1], b.shape[1]
    if p <= q:
        return torch.bmm(a if run.scale is None else a * run.scale, b.mT, out=out)
    b = b if run.scale is None else b * run.scale
    if run.length < 6 * q:
        return torch.bmm(a, b.mT, out=out)
    # A wide left side is slow to transpose inside the product: with many tokens, its narrow result is the cheaper one.
    G = torch.bmm(b, a.mT).mT
    return G if out is None else out.copy_(G)


def weighted_rows(x: Tensor, spans: Tensor | None, scale: Tensor | None) -> list[tuple[Tensor, float]]:
    """CPU form of a sum over tokens Σ_n scale_n² Σ_{t in n} f(x_t): pieces of x [·, d] in float32, and the weight of each.

    Pieces are views; many short ones are gathered into one, weighted by √Σ scale². Padding, which may be NaN, is left out.
    """
    if spans is None:
        return [(x.float(), 1.0)]
    segments = layout(len(x), spans, scale).segments
    tokens = sum(end - begin for begin, end, _ in segments)
    if len(segments) <= 1 or tokens >= SEGMENT_TOKENS * len(segments):
        return [(x[begin:end].float(), weight) for begin, end, weight in segments]
    begins, ends, weights = (torch.tensor(column) for column in zip(*segments))
    lengths = ends - begins
    offset = (begins - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    rows = x[torch.arange(tokens) + offset].float()
    weights = weights.sqrt().repeat_interleave(lengths)
    return [(rows if scale is None else rows.mul_(weights[:, None]), 1.0)]
