"""Per-sample gradient rows: a growing buffer."""

from __future__ import annotations

import torch
from torch import Tensor


class RowBuffer:
    """A [N, width] matrix (float32 unless told otherwise) that grows by doubling; its rows are the samples of one device, in arrival order.

    One buffer may serve many blocks, each a range of its columns: the rows stay aligned across modules.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.width = int(width)
        self.device = torch.device(device)
        self.dtype = dtype
        self._store = torch.empty(0, self.width, dtype=dtype, device=self.device)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    @property
    def rows(self) -> Tensor:
        """The filled part [N, width], a view that is valid until the next `extend`."""
        return self._store[: self._used]

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in total, so that a pass of known length never copies."""
        if rows > len(self._store):
            store = torch.empty(rows, self.width, dtype=self.dtype, device=self.device)
            store[: self._used] = self.rows
            self._store = store

    def extend(self, count: int) -> Tensor:
        """Append `count` uninitialised rows and return them for writing, [count, width]."""
        if self._used + count > len(self._store):
            self.reserve(max(self._used + count, 2 * len(self._store)))
        self._used += count
        return self._store[self._used - count : self._used]

    def append(self, rows: Tensor) -> None:
        """Copy `rows` [M, width] to the end."""
        self.extend(len(rows)).copy_(rows)

    def clear(self) -> None:
        """Forget the rows, keep the memory."""
        self._used = 0


def check_columns(offset: int, shape: tuple[int, int], width: int) -> None:
    """ValueError unless a block of shape [p, q] fits at column `offset` of rows of this width."""
    end = offset + shape[0] * shape[1]
    if not 0 <= offset <= end <= width:
        raise ValueError(f"columns {offset}:{end} lie outside rows of width {width}")
