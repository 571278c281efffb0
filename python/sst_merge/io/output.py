"""Output folders appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError
from .paths import expanded, within

_OURS = ("report.json", "recipe.yml")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: str | Path, *, force: bool) -> Path:
    """The output path, if a run may write there; called before the first minute of work is spent.

    Raises:
        OutputError: something is there already and `force` is off; or it is not an output of this program, which
            `force` does not replace either; or the parent folder cannot be written.
    """
    path = expanded(path).absolute()
    with creating(path):
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

    What stood at `path` before (only with `force`) is removed after the new folder is complete. A complete folder that cannot have
    its name, because another run took it in the meantime, stays where it is, and the error says where.

    Raises:
        OutputError: as `check_output`, and when the place cannot be written, is full, or is no longer free.
    """
    path = check_output(path, force=force)
    with creating(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-partial-", dir=path.parent))
    try:
        with _filling(path, partial):
            yield partial
            for file in (p for p in partial.rglob("*") if p.is_file()):
                _sync(file)
        partial.chmod(0o755)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with _naming(partial, path):
        _replace(partial, path) if force and path.exists() else partial.rename(path)


@contextmanager
def output_file(path: str | Path, *, force: bool = False, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """A hidden sibling of `path` to write to, renamed to `path` when the block ends without an exception.

    `force` replaces a file, but none of the `inputs` and nothing in their folders.

    Raises:
        OutputError: as `output_folder`, for a single file.
    """
    path = expanded(path).absolute()
    partial = path.with_name(f".{path.name}-partial-{secrets.token_hex(6)}")
    with creating(path):
        if path.is_dir() or (path.exists() and not force):
            raise OutputError(f"{path}: exists already; choose another output or pass --force to replace a file")
        if taken := [given for given in inputs if path.exists() and within(path, given)]:
            raise OutputError(f"{path}: belongs to the input {taken[0]}, which --force does not replace")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    try:
        with _filling(path, partial):
            yield partial
            _sync(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with _naming(partial, path):
        if path.exists() and not force:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        partial.replace(path)


def claimed(path: Path) -> int:
    """The descriptor of a file that this process has locked: until it is closed, and by no longer than the process lives.

    Raises:
        OutputError: another process holds it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_nlink == 0:  # the run that held it has just removed it
            raise BlockingIOError
    except (BlockingIOError, PermissionError) as error:
        os.close(file)
        raise OutputError(
            f"{path.parent}: another run is at work there; wait for it, or choose another output"
        ) from error
    except OSError:  # a file system without locks
        pass
    return file


@contextmanager
def creating(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, OutputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path}: cannot be created ({reason}); choose another output") from error


@contextmanager
def _filling(path: Path, partial: Path) -> Iterator[None]:
    from sst_kernels.fisher import StorageError

    try:
        yield
    except OSError as error:
        ours = isinstance(error.filename, str | os.PathLike) and Path(error.filename).is_relative_to(partial)
        if not ours and error.errno not in _FULL and not isinstance(error, StorageError):
            raise
        raise OutputError(
            f"{path}: could not be written ({error.strerror or error}), and nothing was left under that name; free space or "
            "choose another output"
        ) from error


@contextmanager
def _naming(whole: Path, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: is not free any more ({error.strerror}); what this run made is complete and stands in {whole}"
        ) from error
    with contextlib.suppress(OSError):  # not every file system syncs folders
        _sync(path.parent)


def _replace(new: Path, path: Path) -> None:
    """Put a folder in the place of another, which stays if that fails."""
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}-replaced-", dir=path.parent)) / "old"
    try:
        path.rename(old)
        new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old.parent, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
