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

    Example:
        >>> from sst_kernels.ops import spans_from_lengths
        >>> spans_from_lengths(2, 4, torch.tensor([3, 2]), padding="left")
        tensor([[1, 4],
                [6, 8]])
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
    """Spans [N, 2] of a packed batch from its cumulative lengths [N + 1], as varlen attention takes them.

    Example:
        >>> from sst_kernels.ops import spans_from_cu_seqlens
        >>> spans_from_cu_seqlens(torch.tensor([0, 3, 5]))
        tensor([[0, 3],
                [3, 5]])
    """
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
    scale: Tensor | float  # [last - first, 1, 1], or what it is for all of them
    weights: Tensor  # [1, last - first], the scales
    squares: Tensor  # [1, last - first], scale²

    def windows(self, x: Tensor) -> Tensor:
        """The tokens of each sample, [S, d] to a view [m, length, d]."""
        row, column = x.stride()
        size = (self.last - self.first, self.length, x.shape[1])
        return x.as_strided(size, (self.step * row, row, column), x.storage_offset() + self.begin * row)

    def turned(self, x: Tensor) -> Tensor:
        """The same with the tokens last, [m, d, length]."""
        row, column = x.stride()
        size = (self.last - self.first, x.shape[1], self.length)
        return x.as_strided(size, (self.step * row, column, row), x.storage_offset() + self.begin * row)

    def pieces(self, elements: int) -> Iterator[Run]:
        """The run in parts of which the gradients, `elements` each, fit a second-level cache together."""
        most = max(1, CACHED_ELEMENTS // elements)
        if self.last - self.first <= most:
            yield self
            return
        for first in range(self.first, self.last, most):
            last, at = min(first + most, self.last), first - self.first
            scale = self.scale if isinstance(self.scale, float) else self.scale[at : at + most]
            scale = float(scale) if last - first == 1 else scale
            own = self.weights[:, at : at + most], self.squares[:, at : at + most]
            yield Run(first, last, self.begin + at * self.step, self.step, self.length, scale, *own)


class Layout(NamedTuple):
    """What the CPU forms want to know of the spans of a batch."""

    runs: list[Run]  # the samples that have tokens
    empty: list[int]  # the numbers of those that have none
    segments: list[tuple[int, int, float]]  # (begin, end, scale² > 0) of tokens; adjoining ones of one scale are one
    tokens: Tensor | None  # [held], every token of the segments, or None where they hold all, once and in order
    weights: Tensor | float  # [held, 1], scale² of each of them, or what it is for all of them


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
    scales = [1.0] * len(ranges) if scale is None else scale.tolist()
    segments: list[tuple[int, int, float]] = []
    for (begin, end), x in zip(ranges, scales):
        if begin < end and x != 0:
            if segments and segments[-1][1:] == (begin, x * x):
                begin = segments.pop()[0]
            segments.append((begin, end, x * x))
    empty = [n for n, (begin, end) in enumerate(ranges) if begin >= end]
    return last.keep(Layout(list(_runs(ranges, scales)), empty, segments, *_held(S, segments)), S, spans, scale)


def _held(S: int, segments: list[tuple[int, int, float]]) -> tuple[Tensor | None, Tensor | float]:
    begins, ends, squares = zip(*segments) if segments else ((), (), ())
    tokens: Tensor | None = None
    if (0, *ends) != (*begins, S):
        tokens = torch.cat([torch.arange(0), *(torch.arange(begin, end) for begin, end, _ in segments)])
    if len(set(squares)) <= 1:
        return tokens, squares[0] if squares else 1.0
    lengths = torch.tensor(ends) - torch.tensor(begins)
    return tokens, torch.tensor(squares).repeat_interleave(lengths)[:, None]


def _runs(ranges: list[list[int]], scales: list[float]) -> Iterator[Run]:
    first = 0
    while first < len(ranges):
        (begin, end), last = ranges[first], first + 1
        step = ranges[last][0] - begin if last < len(ranges) else 0
        while step > 0 and last < len(ranges) and ranges[last] == [x + (last - first) * step for x in (begin, end)]:
            last += 1
        if begin < end:
            step, own = step if last - first > 1 else end - begin, torch.tensor([scales[first:last]])
            scale = scales[first] if len(set(scales[first:last])) == 1 else own[0, :, None, None]
            yield Run(first, last, begin, step, end - begin, scale, own, own.square())
        first = last


def gradients(run: Run, left: Tensor, right: Tensor, out: Tensor) -> None:
    """CPU form of G_n = scale_n Σ_t left_t right_tᵀ of a run, into `out` [m, p, q] float32."""
    scale = run.scale
    if turns(run, left, right):
        torch.mul(products(run, right, left).mT, scale, out=out)
    elif isinstance(scale, float):
        torch.baddbmm(out, run.turned(left), run.windows(right), beta=0, alpha=scale, out=out)
    else:
        a, b = run.turned(left), run.windows(right)
        torch.bmm(*((a * scale, b) if left.shape[1] <= right.shape[1] else (a, b * scale)), out=out)


def turns(run: Run, left: Tensor, right: Tensor) -> bool:
    """A wide left side is slow to turn inside a product: with many tokens of many samples, turning the result is cheaper."""
    return left.shape[1] > right.shape[1] and run.length >= 6 * right.shape[1] and run.last - run.first > 1


def products(run: Run, left: Tensor, right: Tensor) -> Tensor:
    """CPU form of Σ_t left_t right_tᵀ of every sample of a run, [m, p, q] float32, without their scales."""
    return torch.bmm(run.turned(left), run.windows(right))


def add_weighted(out: Tensor, weights: Tensor, rows: Tensor) -> None:
    """out [p, q] += Σ_n weights_n rows_n, of weights [1, m] and rows [m, p·q]."""
    if out.is_contiguous():
        out.view(1, -1).addmm_(weights, rows)
    else:
        out += (weights @ rows).view(out.shape)


def weighted_rows(
    x: Tensor, spans: Tensor | None, scale: Tensor | None, least: int | None = None
) -> list[tuple[Tensor, Tensor | float]]:
    """CPU form of a sum over tokens, Σ_n scale_n² Σ_{t in n} f(x_t): pieces of x [·, d] in float32, and their weights: one, or [·, 1].

    Padding, which may be NaN, is left out: by views of the tokens between where these are at least `least` long on average and
    have one weight each, else by a copy.
    """
    if spans is None:
        return [(x.float(), 1.0)]
    of = layout(len(x), spans, scale)
    if of.tokens is None and isinstance(of.weights, float):
        return [(x.float(), of.weights)]
    if len(of.segments) == 1 or (
        least is not None and sum(e - b for b, e, _ in of.segments) >= least * len(of.segments)
    ):
        return [(x[begin:end].float(), weight) for begin, end, weight in of.segments]
    return [((x if of.tokens is None else x.index_select(0, of.tokens)).float(), of.weights)]
