"""What was computed of some tensors, kept for whoever asks for the same next."""

from __future__ import annotations

import threading
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

    def holds(self, *of: Any) -> bool:
        """Whether `value` was computed of these."""
        return self._key == _key(of) and all([not storage.expired() for storage in self._storages])

    def keep(self, value: Any, *of: Any) -> Any:
        """Remember `value`, and return it."""
        self.value, self._key = value, _key(of)
        self._storages = tuple(StorageWeakRef(t.untyped_storage()) for t in of if isinstance(t, Tensor))
        return value


def _key(of: tuple) -> tuple:
    return tuple([_identity(x) if isinstance(x, Tensor) else x for x in of])


def _identity(x: Tensor) -> tuple:
    version = object() if x.is_inference() else x._version  # without a version, writes would go unseen
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, version
