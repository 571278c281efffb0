"""The exact Fisher of a block: its per-sample gradient rows, or the n×n matrix they fold into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from sst_kernels.distributed import Gather, Reduction, Sum
from sst_kernels.fisher.base import Joint, TokenBatch
from sst_kernels.fisher.estimate import DOUBLE, SINGLE, Estimate, doubled
from sst_kernels.fisher.structures.algebra import CHUNK, add_gram, rows_gramian, rows_times
from sst_kernels.fisher.structures.rows import RowBuffer, check_columns


class Full(Joint):
    """F = 1/count · Σ_n g_n g_nᵀ, exactly.

    `rows="keep"` (default) keeps every g_n as a float32 row. The n-th row of every block of a pass belongs to the same
    sample, so both the per-module and the cross-module Fisher can be read from one pass: 4·n bytes per sample.

    `rows="fold"` adds the rows into the n×n matrix, products and sums in float64, whenever more than n are waiting: at
    most 12·n² bytes whatever the number of samples, the same F, but which sample a row came from is lost, and with it the
    cross-module Fisher and cross-fitting (`rows` then raises).

    `dtype="bfloat16"` keeps rows in half the memory, rounded once each.

    State: `rows` [N, n] in `dtype`, and for "fold" also `matrix` [n, n] float64 (raw sums).
    """

    kind = "full"

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        device: torch.device | str = "cpu",
        sample: str = "sequence",
        count: str = "sequences",
        rows: str = "keep",
        dtype: str = "float32",
    ):
        super().__init__(shape, device=device, sample=sample, count=count)
        if rows not in ("keep", "fold"):
            raise ValueError(f'rows: expected "keep" or "fold", got {rows!r}')
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f'dtype: expected "float32" or "bfloat16", got {dtype!r}')
        self._mode, self._dtype = rows, dtype
        self._buffer = self._empty()
        self._columns: slice | None = None
        self._matrix: Tensor | None = None

    def options(self) -> dict[str, Any]:
        return {**super().options(), "rows": self._mode, "dtype": self._dtype}

    def _empty(self) -> RowBuffer:
        return RowBuffer(self.size, self.device, getattr(torch, self._dtype))

    @classmethod
    def estimate(cls, shape: tuple[int, int], samples: int, batch: int = 1, **options: Any) -> Estimate:
        n = shape[0] * shape[1]
        if cls.joins(**options):
            return Estimate(SINGLE * n * samples, SINGLE * n * doubled(samples, batch)[1])
        period = (n // batch + 1) * batch  # rows that have arrived when more than n wait
        folded = samples >= period
        state = SINGLE * n * (samples % period) + DOUBLE * n * n * folded
        capacity, growing = doubled(min(samples, period), batch)
        folding = DOUBLE * n * (n + min(period, CHUNK // n)) * folded
        return Estimate(state, max(SINGLE * n * capacity + folding, SINGLE * n * growing))

    @classmethod
    def joins(cls, **options: Any) -> bool:
        return options.get("rows", "keep") == "keep"

    @classmethod
    def separates(cls, **options: Any) -> bool:
        return cls.joins(**options)

    @classmethod
    def rows_for(cls, samples: int, **options: Any) -> int:
        return samples if cls.joins(**options) else 0

    @classmethod
    def spans(cls, **options: Any) -> bool:
        return cls.joins(**options)

    @classmethod
    def per_module(cls, **options: Any) -> dict[str, Any]:
        return {"rows": "fold", **options}

    @property
    def folded(self) -> bool:
        """Whether rows have been summed into the matrix already."""
        return self._matrix is not None

    @property
    def keeps_rows(self) -> bool:
        return not self.folded

    @property
    def rows(self) -> Tensor:
        """Per-sample gradients [N, n] float32, in arrival order. RuntimeError once they were folded."""
        if self.folded:
            raise RuntimeError('the rows of this Fisher were folded into its matrix: accumulate with rows="keep"')
        return self._waiting

    @property
    def _waiting(self) -> Tensor:
        return self._buffer.rows if self._columns is None else self._buffer.rows[:, self._columns]

    def block(self, offset: int, shape: tuple[int, int]) -> Full:
        """The Fisher of the coordinates [offset, offset + p·q) as a block of shape [p, q]: a view of the
        rows of this one, to be read until its next update. ValueError when the columns do not exist or were folded.
        """
        if self.folded or self._columns is not None:
            raise ValueError("blocks are read from a joint Fisher that keeps its rows: not from a folded one or a view")
        check_columns(offset, shape, self.size)
        view = Full(shape, device=self.device, **self.options())
        view._buffer, view._columns = self._buffer, slice(offset, offset + view.size)
        view.counts = self.counts
        return view

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in total, so that none is copied later."""
        self._buffer.reserve(rows)

    def _append(self, rows: Tensor) -> None:
        self._extend(len(rows)).copy_(rows)
        self._fold_when_full()

    def _extend(self, count: int) -> Tensor:
        if self._columns is not None:
            raise RuntimeError("this is a view of one block of a joint Fisher: update the joint Fisher instead")
        return self._buffer.extend(count)

    def _update(self, batch: TokenBatch) -> None:
        if batch.rows is None:
            from sst_kernels.ops import factor_rows

            factor_rows(batch.left, batch.right, batch.spans, batch.scale, self._extend(len(batch.spans)))
            self._fold_when_full()
        else:
            self._append(batch.rows)

    def _fold_when_full(self) -> None:
        if self._mode == "fold" and len(self._buffer) > self.size:
            self._fold()

    def _fold(self) -> Tensor:
        total = self._sums()
        add_gram(self._buffer.rows, total)
        self._buffer.clear()
        return total

    def _sums(self) -> Tensor:
        if self._matrix is None:
            self._matrix = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        return self._matrix

    def _merge(self, other: Self) -> None:
        if other._matrix is not None:
            self._sums().add_(other._matrix.to(self.device))
        self._append(other._waiting)

    def reduction(self) -> Reduction:
        """Concatenate the rows of all ranks in rank order, or add the matrices where the total folds: exact."""
        self._extend(0)
        state = torch.tensor([len(self._buffer), int(self.folded)])
        yield Sum([state])
        total, folded = state.tolist()
        if folded or (self._mode == "fold" and total > self.size):
            yield Sum([self._fold()])
            return
        rows = self._empty()
        rows.reserve(total)
        for piece in (yield Gather(self._buffer.rows)):
            rows.append(piece)
        self._buffer = rows

    def state_dict(self) -> dict[str, Tensor]:
        state = {"rows": self._waiting}
        if self._matrix is not None:
            state["matrix"] = self._matrix
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._buffer, self._columns, self._matrix = self._empty(), None, None
        self._buffer.append(state["rows"].to(self.device))
        if "matrix" in state:
            self._sums().copy_(state["matrix"])

    def matvec(self, vectors: Tensor) -> Tensor:
        out = rows_gramian(self._waiting, vectors)
        if self._matrix is not None:
            out += self._matrix @ vectors.to(self.device, torch.float64)
        return out / self.normaliser

    def quadratic(self, vectors: Tensor) -> Tensor:
        if self.folded:
            return super().quadratic(vectors)
        return rows_times(self._waiting, vectors).square().sum(0) / self.normaliser

    def operator(self) -> Any:
        """`LowRank(rows / √count)`, or `Dense` once folded or when there are more rows than coordinates."""
        from sst_kernels.gevp.operators import Dense, LowRank

        if self.folded or len(self._waiting) > self.size:
            return Dense(self.dense())
        return LowRank(self._waiting.double() / self.normaliser**0.5)
