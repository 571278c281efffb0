"""What was computed of some tensors, kept for whoever asks for the same next."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Memo(threading.local):
    """The `value` that was kept last, on this thread, and what it was computed of: tensors and plain values.

    The same tensors are the same live storage, unwritten since; they are not kept alive.
    """

    value: Any = None
    _key: tuple = ()
    _storages: tuple[StorageWeakRef, ...] = ()
    _seen: tuple[Any, ...] = ()  # the same once more, as objects: what is asked for again and again is quickly known

    def holds(self, *of: Any) -> bool:
        """Whether `value` was computed of these."""
        if len(of) == len(self._seen) and all(map(_same, of, self._seen)):
            return True
        return self._key == _key(of) and all([not storage.expired() for storage in self._storages])

    def keep(self, value: Any, *of: Any) -> Any:
        """Remember `value`, and return it."""
        self.value, self._key = value, _key(of)
        self._storages = tuple(StorageWeakRef(t.untyped_storage()) for t in of if isinstance(t, Tensor))
        self._seen = tuple([_Seen(x) if isinstance(x, Tensor) else x for x in of])
        return value


class _Seen:
    """A tensor as an object: weakly, and what tells whether it was written, moved or reshaped since."""

    __slots__ = ("at", "shape", "tensor", "version")

    def __init__(self, x: Tensor):
        self.tensor, self.at, self.shape = weakref.ref(x), x.data_ptr(), x.shape
        self.version = None if x.is_inference() else x._version  # without a version, writes would go unseen


def _same(x: Any, seen: Any) -> bool:
    if type(seen) is not _Seen:
        return not isinstance(x, Tensor) and bool(x == seen)
    return (
        isinstance(x, Tensor)
        and x is seen.tensor()
        and seen.version is not None
        and x._version == seen.version
        and x.data_ptr() == seen.at
        and x.shape == seen.shape
    )


def _key(of: tuple) -> tuple:
    return tuple([_identity(x) if isinstance(x, Tensor) else x for x in of])


def _identity(x: Tensor) -> tuple:
    version = object() if x.is_inference() else x._version  # without a version, writes would go unseen
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, version
