"""Modules that read one tensor (q, k, v; gate, up) come one after another: what was computed of it serves them all."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class LastInput(threading.local):
    """The `value` that was kept for the last input of this thread."""

    value: Any = None
    _key: tuple | None = None
    _spans: Tensor | None = None
    _storage: StorageWeakRef

    def holds(self, x: Tensor, spans: Tensor | None, *options: Any) -> bool:
        """Whether `value` belongs to x: the same live storage, unwritten since, under the same spans and options."""
        return self._key == _key(x, options) and self._spans is spans and not self._storage.expired()

    def keep(self, value: Any, x: Tensor, spans: Tensor | None, *options: Any) -> Any:
        """Remember `value` for x, and return it."""
        self.value, self._key, self._spans = value, _key(x, options), spans
        self._storage = StorageWeakRef(x.untyped_storage())
        return value


def _key(x: Tensor, options: tuple) -> tuple:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x._version, *options
