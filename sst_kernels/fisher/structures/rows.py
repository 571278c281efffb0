"""Per-sample gradient rows: a growing buffer, and gathering over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RowBuffer:
    """A float32 [N, width] matrix that grows by doubling; its rows are the samples of one device, in arrival order.

    One buffer may serve many blocks, each a range of its columns: the rows stay aligned across modules.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.width = int(width)
        self.device = torch.device(device)
        self._store = torch.empty(0, self.width, dtype=torch.float32, device=self.device)
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
            store = torch.empty(rows, self.width, dtype=torch.float32, device=self.device)
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


def gather_rows(rows: Tensor, group: Any = None) -> Tensor:
    """Concatenate the [N_rank, n] tensors of all ranks of `group`, in rank order; N may differ and may be zero."""
    import torch.distributed as dist

    world = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(rows)], device=rows.device), group=group)
    sizes = [int(n) for n in lengths]
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
