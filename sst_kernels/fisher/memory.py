"""What a Fisher pass and a pencil will take in memory, said before the first batch.

`state` is what the structure holds when the pass ends (its `nbytes`), `peak` the most that it and its own temporaries take at
any time. The model, its activations and the logits are the caller's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sst_kernels.fisher.available import available
from sst_kernels.fisher.base import Block, whole
from sst_kernels.fisher.fisher import Fisher
from sst_kernels.fisher.structures.algebra import CHUNK
from sst_kernels.fisher.structures.full import Full
from sst_kernels.ops.gram.op import _BLOCK as GRAM_BLOCK
from sst_kernels.ops.spans import CACHED_ELEMENTS

SINGLE, DOUBLE = 4, 8


@dataclass(frozen=True)
class Estimate:
    """Bytes: of the state at the end of a pass, and at its peak."""

    state: int
    peak: int

    def __add__(self, other: Estimate) -> Estimate:
        """Of two structures side by side: states add; temporaries live one at a time."""
        temporary = max(self.peak - self.state, other.peak - other.state)
        return Estimate(self.state + other.state, self.state + other.state + temporary)


def estimate(
    structure: str,
    blocks: Sequence[Block],
    samples: int,
    *,
    batch: int = 1,
    space: str = "core",
    scope: str = "global",
    sample: str = "sequence",
    options: Mapping[str, Any] | None = None,
) -> Estimate:
    """The memory of a pass over `samples` sequences (tokens for sample="token") in batches of `batch`.

    `blocks`, `space`, `scope` and `options` as in `fisher_accumulate`. ValueError for an unknown structure.
    """
    if structure not in _SIZES:
        raise ValueError(f"structure: expected one of {sorted(_SIZES)}, got {structure!r}")
    given = dict(options or {})
    joint = scope == "global" and space == "core" and sample == "sequence" and given.get("rows") != "fold"
    if joint and structure in ("full", "diagonal", "lowrank"):
        size = sum(b.size for b in blocks)
        own = _SIZES[structure]((size, 1), samples, batch, given)
        return Estimate(own.state, own.peak + SINGLE * batch * size)
    if structure == "full" and scope == "module":
        given.setdefault("rows", "fold")
    parts = [_SIZES[structure](b.shape, samples, batch, given) for b in blocks]
    return sum(parts[1:], parts[0])


def estimate_moments(shapes: Sequence[tuple[int, int]]) -> Estimate:
    """The memory of running second moments Σ x xᵀ [d, d] of tokens, each kept as [d, columns]: a sketch where columns < d."""
    widest = max((d for d, columns in shapes if columns == d), default=0)
    blocks = widest * min(widest, GRAM_BLOCK)  # at most, of the diagonal, before they are added
    drawn = {(d, columns): d * columns for d, columns in shapes if columns < d}  # test matrices, drawn as integers
    drawing = SINGLE * sum(drawn.values()) + (2 * DOUBLE + SINGLE) * max(drawn.values(), default=0)
    state = sum(SINGLE * (d + columns * (columns < d)) * columns + DOUBLE for d, columns in shapes)
    return Estimate(state, state + max(SINGLE * blocks, drawing))


def require(
    what: str, needed: Estimate, device: torch.device | str, alternatives: Mapping[str, Estimate], otherwise: str
) -> None:
    """MemoryError, naming those alternatives that would fit or else `otherwise`, unless `needed.peak` bytes are available on `device`.

    With SST_MEMORY=warn in the environment a warning. ValueError when that variable is neither "warn" nor "refuse".
    """
    asked = os.environ.get("SST_MEMORY") or "refuse"
    if asked not in ("refuse", "warn"):
        raise ValueError(f'SST_MEMORY: expected "refuse" or "warn", got {asked!r}')
    free = available(device)
    if free is None or needed.peak <= free:
        return
    fitting = [f"{instead} ({_gib(e.peak)})" for instead, e in alternatives.items() if e.peak <= free]
    advice = f"these would fit: {'; '.join(fitting)}" if fitting else otherwise
    text = f"{what} would take {_gib(needed.peak)} on {device} and {_gib(free)} are available; {advice}"
    if asked == "refuse":
        raise MemoryError(f"{text}; SST_MEMORY=warn in the environment tries all the same")
    warnings.warn(text, stacklevel=3)


def reserve(fisher: Fisher, sequences: int, options: Mapping[str, Any], ranks: int = 1) -> None:
    """Set memory aside for the rows of `sequences`. MemoryError, naming what would fit, when a pass over them would not.

    Each of `ranks` processes brings about as many, and holds the total in the end.
    """
    sequences = whole("sequences", sequences, 0)
    meta, joint = fisher.meta, fisher.joint
    about = {"space": meta["space"], "scope": meta["scope"], "sample": meta["sample"]}
    total = sequences * ranks
    others: dict[str, tuple[str, dict[str, Any]]] = {
        f'structure="lowrank", rank={rank}': ("lowrank", {"rank": rank}) for rank in (1024, 256, 64)
    }
    others |= {'scope="module"': ("full", {"rows": "fold"}), 'structure="diagonal"': ("diagonal", {})}
    homes = {name: (fisher[name] if joint is None else joint).device for name in fisher.blocks}
    for device in dict.fromkeys(homes.values()):
        blocks = [block for name, block in fisher.blocks.items() if homes[name] == device]
        needed = estimate(meta["structure"], blocks, total, options=options, **about)
        if isinstance(joint, Full):  # nothing has to double; a rank's own rows stand beside the total while it arrives
            needed = Estimate(needed.state, needed.state + (needed.state // ranks if ranks > 1 else 0))
        alternatives = {
            what: estimate(kind, blocks, total, options=given, **about)
            for what, (kind, given) in others.items()
            if meta["space"] == "core"
        }
        require("the Fisher state", needed, device, alternatives, "use fewer sequences, fewer modules or a lower rank")
    if isinstance(joint, Full):
        try:
            joint.reserve(sequences)
        except RuntimeError as error:  # torch's, of a host or a device whose memory is in pieces
            raise MemoryError(f"{_gib(needed.state)} in one piece are not free on {joint.device}: {error}") from error


def _full(shape: tuple[int, int], samples: int, batch: int, options: Mapping[str, Any]) -> Estimate:
    n = shape[0] * shape[1]
    if options.get("rows", "keep") == "keep":
        return Estimate(SINGLE * n * samples, SINGLE * n * _doubled(samples, batch)[1])
    period = (n // batch + 1) * batch  # rows that have arrived when more than n wait
    folded = samples >= period
    state = SINGLE * n * (samples % period) + DOUBLE * n * n * folded
    capacity, growing = _doubled(min(samples, period), batch)
    folding = DOUBLE * n * (n + min(period, CHUNK // n)) * folded
    return Estimate(state, max(SINGLE * n * capacity + folding, SINGLE * n * growing))


def _doubled(rows: int, batch: int) -> tuple[int, int]:
    """Rows that a doubling buffer has room for in the end, and the most that it holds while it is copied."""
    capacity, peak = 0, 0
    while capacity < rows:
        wanted = max(min(rows, capacity // batch * batch + batch), 2 * capacity)
        peak, capacity = max(peak, capacity + wanted), wanted
    return capacity, peak


def _diagonal(shape: tuple[int, int], samples: int, batch: int, options: Mapping[str, Any]) -> Estimate:
    n, centred = shape[0] * shape[1], options.get("centred", False)
    state = 2 * SINGLE * n + DOUBLE if centred else SINGLE * n
    return Estimate(state, state + SINGLE * n * (_gradients(n, batch) + 2 * centred))


def _vila(shape: tuple[int, int], samples: int, batch: int, options: Mapping[str, Any]) -> Estimate:
    return _diagonal(shape, samples, batch, {**options, "centred": True})


def _kronecker(shape: tuple[int, int], samples: int, batch: int, options: Mapping[str, Any]) -> Estimate:
    return estimate_moments([(d, d) for d in shape])


def _kronecker_lowrank(shape: tuple[int, int], samples: int, batch: int, options: Mapping[str, Any]) -> Estimate:
    return estimate_moments([(d, min(d, whole("rank", options.get("rank", 64)))) for d in shape])


def _eigen_kronecker(shape: tuple[int, int], samples: int, batch: int, options: Mapping[str, Any]) -> Estimate:
    p, q = shape
    state = SINGLE * (p * p + q * q + p * q)
    bases = DOUBLE * (3 * max(p, q) ** 2 + min(p, q) ** 2)  # while they are found
    return Estimate(state, state + max(bases, SINGLE * p * q * (_gradients(p * q, batch) + 1)))


def _gradients(n: int, batch: int) -> int:
    """How many times n numbers a CPU holds to add up the gradients of a batch: as many as its cache does, and their sum."""
    at_once = min(batch, max(1, CACHED_ELEMENTS // n))
    return at_once + (at_once > 1)


def _lowrank(shape: tuple[int, int], samples: int, batch: int, options: Mapping[str, Any]) -> Estimate:
    return _sketch(shape[0] * shape[1], samples, options.get("rank", 128))


def _kronecker_svd(shape: tuple[int, int], samples: int, batch: int, options: Mapping[str, Any]) -> Estimate:
    n = shape[0] * shape[1]
    return _sketch(n, samples, options.get("sketch") or min(n, 256))


def _sketch(n: int, samples: int, rank: int) -> Estimate:
    rank = whole("rank", rank)
    full = 2 * rank
    used = samples if samples <= full else rank + (samples - full - 1) % rank + 1
    shrinking = DOUBLE * 3 * (full * full + min(CHUNK, full * n)) // 2 if samples > full else 0
    return Estimate(SINGLE * n * used + 2 * DOUBLE, SINGLE * n * full + shrinking)


_SIZES: dict[str, Callable[[tuple[int, int], int, int, Mapping[str, Any]], Estimate]] = {
    "full": _full,
    "diagonal": _diagonal,
    "vila": _vila,
    "kronecker": _kronecker,
    "kronecker_lowrank": _kronecker_lowrank,
    "eigen_kronecker": _eigen_kronecker,
    "lowrank": _lowrank,
    "kronecker_svd": _kronecker_svd,
}


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 26 else f"{size / 2**20:.2f} MiB"
