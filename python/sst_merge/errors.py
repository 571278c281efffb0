"""The one family of errors that a user's input can cause; the CLI prints their text and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MAX_SEED = 2**63 - 1  # what torch's generators take


class MergeError(ValueError):
    """Something the user gave cannot be used. The text says what was expected, what came, and what to do."""


class AdapterError(MergeError):
    """An adapter folder that cannot be read, or that no exact merge exists for."""


class DataError(MergeError):
    """A data file or one of its lines; the text names the file and the line."""


class ModelError(MergeError):
    """A model that is not there, or that an adapter does not fit."""


class RecipeError(MergeError):
    """A recipe with unknown, missing or contradictory entries."""


class OutputError(MergeError):
    """An output folder that exists already or cannot be written."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or on a device."""
    from torch import OutOfMemoryError

    return isinstance(error, MemoryError | OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def headlined(what: str) -> Iterator[None]:
    """sst_kernels raises with advice (ValueError, FloatingPointError, MemoryError, StorageError, GEVPError, TypeError), torch where a
    decomposition fails (LinAlgError); the user reads it under one headline, as a MergeError."""
    from torch.linalg import LinAlgError

    from sst_kernels.fisher import StorageError
    from sst_kernels.gevp import GEVPError

    try:
        yield
    except MergeError:
        raise
    except (ValueError, FloatingPointError, MemoryError, StorageError, GEVPError, TypeError, LinAlgError) as error:
        raise MergeError(f"{what}: {error}") from error
