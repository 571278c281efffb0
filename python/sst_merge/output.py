"""Output folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError
from .paths import expanded

_OURS = ("report.json", "recipe.yml")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: str | Path, *, force: bool) -> Path:
    """The output path, if a run may write there; called before the first minute of work is spent.

    Raises:
        OutputError: something is there already and `force` is off; or it is not an output of this program, which
            `force` does not replace either; or the parent folder cannot be written.
    """
    path = expanded(path).absolute()
    with _creating(path):
        if path.is_symlink() or path.is_file():
            raise OutputError(
                f"{path}: expected a folder name that is free, found a file or link; choose another output"
            )
        if path.is_dir() and any(path.iterdir()):
            if not force:
                raise OutputError(f"{path}: exists already; choose another output or pass --force to replace it")
            if not any((path / name).is_file() for name in _OURS):
                raise OutputError(f"{path}: is not an earlier output of sst-merge, so --force does not replace it")
        parent = next(p for p in path.parents if p.exists())
        if not parent.is_dir():
            raise OutputError(f"{parent}: is no folder, so {path} cannot be created; choose another output")
        if not os.access(parent, os.W_OK):
            raise OutputError(f"{parent}: is not writable; choose another output")
    return path


@contextmanager
def output_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A hidden sibling of `path` to write into, renamed to `path` when the block ends without an exception.

    What stood at `path` before (only with `force`) is removed after the new folder is complete.

    Raises:
        OutputError: as `check_output`, and when the place cannot be written or is full.
    """
    path = check_output(path, force=force)
    with _creating(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-partial-", dir=path.parent))
    try:
        with _filling(path):
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
        OutputError: as `check_output`, for a single file, and when the place cannot be written or is full.
    """
    path = expanded(path).absolute()
    partial = path.with_name(f".{path.name}-partial-{os.getpid()}")
    with _creating(path):
        if path.is_dir() or (path.exists() and not force):
            raise OutputError(f"{path}: exists already; choose another output or pass --force to replace a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    try:
        with _filling(path):
            yield partial
            with partial.open("rb") as handle:
                os.fsync(handle.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _creating(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, OutputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path}: cannot be created ({reason}); choose another output") from error


@contextmanager
def _filling(path: Path) -> Iterator[None]:
    from sst_kernels.fisher import StorageError

    try:
        yield
    except OSError as error:
        if error.errno not in _FULL and not isinstance(error, StorageError):
            raise
        raise OutputError(
            f"{path}: could not be written ({error.strerror or error}), and nothing was left under that name; free space or "
            "choose another output"
        ) from error
