"""Passes that survive: checkpoints at intervals and on SIGTERM, and going on where the last one stood.

    path = rank_path("harm.checkpoint", group)
    with fisher_accumulate(model, "safety", group=group, resume=path if path.exists() else None) as harm:
        with Checkpoints(harm, path, every=100) as keep:
            for batch in keep.remaining(batches):
                model(**batch).loss.backward()
    keep.remove()

A resumed pass gives the bits of an uninterrupted one if its items come in the same order with the same label draws; seeding
the generator of each item from its number (`item_seed`) makes the draws independent of where a run stopped.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from sst_kernels.fisher.base import whole
from sst_kernels.fisher.hooks import Hooks
from sst_kernels.fisher.storage import StorageError, partial_prefix

T = TypeVar("T")


class Interrupted(SystemExit):
    """SIGTERM arrived and the state is safe; the process leaves with 143, as the shell reports a SIGTERM.

    Example:
        >>> from sst_kernels.fisher import Interrupted
        >>> try:  # what a pass raises that was told to stop
        ...     raise Interrupted("gain.checkpoint holds 3 batches")
        ... except Interrupted as stop:
        ...     print(stop)
        gain.checkpoint holds 3 batches
    """

    def __init__(self, text: str):
        super().__init__(143)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Checkpoints:
    """Keeps a checkpoint of an open pass at `path`, and ends the pass in good order on SIGTERM.

    Args:
        accumulator: the pass of `fisher_accumulate` or `Evidence.accumulate`, started with `resume=path` to go on from an earlier one.
        path: the file; one per rank (`rank_path`).
        every: items between two checkpoints.
        seconds: or the time between them; whichever comes first.
        identity: what the items depend on (hash of the data, seed); a checkpoint of another identity is refused.

    Raises on entering: StorageError when the place cannot be written, so that no work is lost later; ValueError when the
    resumed checkpoint has another identity, or when one of another number of processes stands beside it. A disk that fills up later does not end the pass: a warning names the last good
    checkpoint.

    Example:
        >>> from sst_kernels.fisher import Checkpoints
        >>> evidence = sst.Evidence.of(model, adapter="safety")
        >>> with evidence.accumulate("gain") as reading, Checkpoints(reading, "gain.checkpoint", every=1) as keep:
        ...     for batch in keep.remaining(harm_batches):
        ...         reading.backward(batch)
        >>> evidence.gain.counts.sequences
        8
    """

    def __init__(
        self,
        accumulator: Hooks,
        path: str | os.PathLike,
        *,
        every: int | None = None,
        seconds: float | None = 600.0,
        identity: str = "",
    ):
        every = None if every is None else whole("every", every)
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"seconds: expected a number that is not negative, got {seconds}")
        self.accumulator, self.path = accumulator, Path(path)
        self.every, self.seconds, self.identity = every, seconds, identity
        self.done = int(accumulator.progress.get("items", 0))
        self._saved, self._saved_at = self.done, time.monotonic()
        self._stop = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._refuse_other_worlds()
        found = self.accumulator.progress.get("identity", self.identity)
        if found != self.identity:
            raise ValueError(
                f"{self.path} is a checkpoint of other data, order or seed ({found!r}, this pass has {self.identity!r}): "
                "remove it to start anew"
            )
        for stale in self.path.parent.glob(f"{partial_prefix(self.path)}*"):  # of a process killed while writing
            stale.unlink(missing_ok=True)
        if self.done == 0:
            self.save()
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def remaining(self, items: Iterable[T]) -> Iterator[T]:
        """The items that the resumed checkpoint does not hold yet; each counts as done when the next one is asked for.

        Raises Interrupted, after a last checkpoint, when SIGTERM has arrived.
        """
        for number, item in enumerate(items):
            if number < self.done:
                continue
            yield item
            self.done = number + 1
            if self._stop:
                self.save()
                raise Interrupted(f"stopped by SIGTERM after {self.done} items; {self.path} holds them: resume from it")
            if self._due():
                self._try_to_save()

    def save(self) -> None:
        """Write the checkpoint now. Raises StorageError; the one before is intact then."""
        self.accumulator.save_checkpoint(self.path, {"items": self.done, "identity": self.identity})
        self._saved, self._saved_at = self.done, time.monotonic()

    def remove(self) -> None:
        """Delete the checkpoint, once its pass is complete and saved."""
        self.path.unlink(missing_ok=True)

    def _refuse_other_worlds(self) -> None:
        """What other ranks took of the data is not what they would take now: going on would count batches twice or never."""
        name, world = _world_of(self.path.name)
        for other in sorted(self.path.parent.glob(f"{glob.escape(name)}*")):
            base, count = _world_of(other.name)
            if base == name and count != world:
                raise ValueError(
                    f"{other} is a checkpoint of a pass over {count} process{'es' * (count > 1)}, and this one runs in {world}: "
                    f"go on with {count}, or remove the checkpoints to start anew"
                )

    def _due(self) -> bool:
        waited = time.monotonic() - self._saved_at
        return self.done - self._saved >= (self.every or float("inf")) or waited >= (self.seconds or float("inf"))

    def _try_to_save(self) -> None:
        try:
            self.save()
        except StorageError as error:
            warnings.warn(
                f"no checkpoint after {self.done} items, the last good one holds {self._saved}: {error}", stacklevel=3
            )
            self._saved_at = time.monotonic()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise Interrupted(f"stopped by a second SIGTERM; {self.path} holds {self._saved} items: resume from it")
        self._stop = True


def rank_path(path: str | os.PathLike, group: Any = None) -> Path:
    """Where this rank of a torch.distributed group keeps its own checkpoint; `path` itself in a single process.

    Example:
        >>> from sst_kernels.fisher import rank_path
        >>> str(rank_path("gain.checkpoint"))  # no group: one process
        'gain.checkpoint'
    """
    import torch.distributed as dist

    path = Path(path)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return path
    return path.with_name(f"{path.name}.rank{dist.get_rank(group)}of{dist.get_world_size(group)}")


def _world_of(name: str) -> tuple[str, int]:
    """Undoes `rank_path`: the name without its rank, and the number of processes."""
    found = re.fullmatch(r"(.+)\.rank\d+of(\d+)", name)
    return (found[1], int(found[2])) if found else (name, 1)


def item_seed(seed: int, number: int) -> int:
    """A seed for item `number` of a run with `seed`: independent of the items before it, of rank and world size.

    Example:
        >>> from sst_kernels.fisher import item_seed
        >>> item_seed(0, 7) == item_seed(0, 7) != item_seed(0, 8)
        True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:7], "big")
