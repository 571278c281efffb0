"""Spans: which tokens of a flat batch [S, ·] belong to which sample.

`spans` [N, 2] int64 holds one half-open token range per sample. Right- or left-padded dense batches and packed ones
(`cu_seqlens`) differ in nothing but their spans; tokens outside every span are padding and never reach a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

# Upper bound on the elements of one batched temporary of the CPU forms: 64 MiB of float32.
CHUNK_ELEMENTS = 1 << 24


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


def held_tokens(S: int, spans: Tensor | None, scale: Tensor | None, power: int) -> tuple[Tensor | slice, Tensor | None]:
    """CPU form of a sum over tokens: (which of the S tokens some span holds, Σ over the spans that hold it of scale^power).

    Both as short as they can be: `slice(None)` where the spans hold every token once and in order, weights None where all are
    one. Padding is left out rather than multiplied by zero: it may be NaN.
    """
    if spans is None:
        return slice(None), None
    lengths = (spans[:, 1] - spans[:, 0]).clamp(min=0)
    each = None if scale is None else (scale**power).repeat_interleave(lengths)
    if int(lengths.sum()) == S and torch.equal(spans[:, 0], lengths.cumsum(0) - lengths):
        return slice(None), each
    owner = torch.repeat_interleave(torch.arange(len(spans)), lengths)
    first = torch.cumsum(lengths, 0) - lengths
    tokens = spans[owner, 0] + torch.arange(len(owner)) - first[owner]
    weight = torch.zeros(S).index_add_(0, tokens, torch.ones(len(tokens)) if each is None else each)
    held = torch.zeros(S, dtype=torch.bool).index_fill_(0, tokens, True).nonzero().flatten()
    return held, weight[held]


def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """weight_t · x_t."""
    return x if weight is None else x * weight[:, None]


def by_length(spans: Tensor, limit: int) -> Iterator[tuple[slice | list[int], Callable[[Tensor], Tensor]]]:
    """CPU form: samples grouped by equal length, so that they become one batched product.

    Yields (samples, take): at most max(1, limit) samples of one length L > 0, and the function that takes their tokens,
    [..., S, d] to [..., m, L, d]; a view where they are evenly spaced, as in a dense batch.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    for n, (begin, end) in enumerate(spans.tolist()):
        if begin < end:
            groups.setdefault(end - begin, []).append((n, begin))
    for L, members in groups.items():
        for at in range(0, len(members), max(1, limit)):
            numbers, begins = map(list, zip(*members[at : at + max(1, limit)]))
            m, first, last = len(numbers), begins[0], begins[-1]
            step = (last - first) // (m - 1) if m > 1 else L
            samples = slice(numbers[0], numbers[-1] + 1) if numbers[-1] - numbers[0] + 1 == m else numbers
            if step > 0 and begins == list(range(first, last + 1, step)):
                yield samples, partial(_windows, at=slice(first, last + L), length=L, step=step)
            else:
                yield samples, partial(_gathered, tokens=torch.tensor(begins)[:, None] + torch.arange(L))


def _windows(x: Tensor, at: slice, length: int, step: int) -> Tensor:
    return x[..., at, :].unfold(-2, length, step).mT


def _gathered(x: Tensor, tokens: Tensor) -> Tensor:
    return x[..., tokens, :]


def sample_sums(
    left: Tensor, right: Tensor, spans: Tensor, scale: Tensor | None, limit: int = CHUNK_ELEMENTS
) -> Iterator[tuple[slice | list[int], Tensor]]:
    """CPU form of G_n = scale_n · Σ_t left_t right_tᵀ: yields (samples [m], G [m, p, q])."""
    p, q = left.shape[-1], right.shape[-1]
    for samples, take in by_length(spans, limit // max(1, p * q)):
        a, b = take(left).float(), take(right).float()
        if scale is not None:
            s = scale[samples].float()[:, None, None]
            a, b = (a * s, b) if p <= q else (a, b * s)
        yield samples, a.mT @ b
