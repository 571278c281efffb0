"""Output folders appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError

_OURS = ("report.json", "adapter_config.json", "recipe.yml", "evaluation.json")


def check_output(path: str | Path, *, force: bool) -> Path:
    """The output path, if a run may write there; called before the first minute of work is spent.

    Raises:
        OutputError: something is there already and `force` is off; or it is not an output of this program, which
            `force` does not replace either; or the parent folder cannot be written.
    """
    path = Path(path).expanduser().absolute()
    if path.is_symlink() or path.is_file():
        raise OutputError(f"{path}: expected a folder name that is free, found a file or link; choose another output")
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise OutputError(f"{path}: exists already; choose another output or pass --force to replace it")
        if not any((path / name).is_file() for name in _OURS):
            raise OutputError(f"{path}: is not an earlier output of sst-merge, so --force does not replace it")
    parent = next(p for p in path.parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent}: is not writable; choose another output")
    return path


@contextmanager
def output_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A hidden sibling of `path` to write into, renamed to `path` when the block ends without an exception.

    What stood at `path` before (only with `force`) is removed after the new folder is complete.
    """
    path = check_output(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-partial-", dir=path.parent))
    try:
        yield partial
        for file in (p for p in partial.rglob("*") if p.is_file()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        partial.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-replaced-", dir=path.parent))
            path.rename(old / "old")
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def output_file(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A hidden sibling of `path` to write to, renamed to `path` when the block ends without an exception.

    Raises:
        OutputError: as `check_output`, for a single file.
    """
    path = Path(path).expanduser().absolute()
    if path.is_dir() or (path.exists() and not force):
        raise OutputError(f"{path}: exists already; choose another output or pass --force to replace a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-partial-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
