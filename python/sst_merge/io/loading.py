"""What every reading of a model folder by transformers wants: its errors as ours, and no bars beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import ModelError


@contextmanager
def loading(source: str | Path) -> Iterator[None]:
    """What transformers raises over a model folder, as a ModelError."""
    try:
        yield
    except (
        OSError,
        ValueError,
        RuntimeError,
        AssertionError,
        ImportError,
        KeyError,
        TypeError,
        SafetensorError,
    ) as error:
        if isinstance(error, ModelError):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"model {source}: cannot be loaded ({reason}); expected a causal language model that transformers knows, in "
            "safetensors, with its tokenizer (code that travels with a model is never run)"
        ) from error


class progress_bars_off:
    """Silence transformers' own bars and loading notes: one program, one progress display."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._was_on, self._level = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging

        if self._was_on:
            logging.enable_progress_bar()
        logging.set_verbosity(self._level)
