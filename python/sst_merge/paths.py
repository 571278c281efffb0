"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from .errors import RecipeError


def expanded(path: str | Path) -> Path:
    """`path` with its `~` resolved. Raises RecipeError for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{path}: names a home folder that does not exist; write the path in full") from error
