"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import RecipeError


def expanded(path: str | Path) -> Path:
    """`path` with its `~` resolved. Raises RecipeError for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{path}: names a home folder that does not exist; write the path in full") from error


def within(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is `folder` or lies in it, whatever links and `..` say. ValueError for a zero byte in a name."""
    inner, outer = (Path(os.path.realpath(expanded(p))) for p in (path, folder))
    return inner.is_relative_to(outer)


def pointer(path: Path) -> str:
    """What to say of a file that Git LFS has left a pointer in place of; "" for any other."""
    try:
        with path.open("rb") as file:
            found = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return ""
    return (
        "it is a pointer of Git LFS, not the file itself: run git lfs pull in its repository, or download it again"
        if found
        else ""
    )
