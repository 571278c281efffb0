"""Where an unfinished run keeps its state, and the lock that keeps a second one off it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sst_kernels.fisher import rank_path

from ..errors import OutputError
from ..io.output import claimed, creating
from ..io.paths import expanded
from .launch import leader, world


@dataclass(frozen=True)
class Continuity:
    """Where a run keeps its checkpoints, how often it writes them (in batches), and whether it goes on from them."""

    folder: Path
    every: int
    resume: bool = False
    lock: int | None = field(default=None, repr=False, compare=False)

    @classmethod
    def beside(cls, output: Path, every: int | None, resume: bool) -> Continuity | None:
        """Checkpoints in a hidden folder beside the output; None without `every` and `resume`.

        Raises OutputError when checkpoints of an unfinished run stand there and `resume` does not ask for them, when another run
        that still works keeps its own there, and when the folder cannot be created.
        """
        if every is None and not resume:
            return None
        output = expanded(output).absolute()
        folder = output.with_name(f".{output.name}-checkpoints")
        with creating(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = claimed(folder / "lock") if leader() else None
        keep = cls(folder, every or 100, resume, lock)
        if not resume and keep.begun:
            keep.close()
            raise OutputError(
                f"{folder} holds the checkpoints of an unfinished run: go on with --resume, or remove that folder"
            )
        return keep

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self.folder.glob("*.checkpoint*"))

    def path(self, name: str) -> Path:
        """The checkpoint of the pass called `name`, one per rank."""
        return rank_path(self.folder / f"{name}.checkpoint", world())

    def remove(self) -> None:
        """Delete the checkpoints of a run that has written its output."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let other runs have the folder."""
        if self.lock is not None:
            os.close(self.lock)


@contextmanager
def continuing(output: Path, every: int | None, resume: bool) -> Iterator[Continuity | None]:
    """`Continuity.beside` for a block: when it ends its checkpoints are removed, when it fails they stay, and others may go on."""
    continuity = Continuity.beside(output, every, resume)
    if continuity is None:
        yield None
        return
    done = False
    try:
        yield continuity
        done = True
    finally:
        if leader() and (done or not continuity.begun):
            continuity.remove()
        continuity.close()
