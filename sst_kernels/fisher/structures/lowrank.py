"""Frequent Directions: a deterministic low-rank sketch of the Fisher with a running certificate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from sst_kernels.distributed import Gather, Reduction, Sum
from sst_kernels.fisher.base import Joint, TokenBatch, whole
from sst_kernels.fisher.estimate import DOUBLE, SINGLE, Estimate
from sst_kernels.fisher.structures.algebra import CHUNK, rows_gramian, rows_inner, rows_times
from sst_kernels.fisher.structures.rows import check_columns

DEFAULT_RANK = 128
UNIT = torch.finfo(torch.float32).eps / 2


class LowRank(Joint):
    """F̃ = BᵀB / count with B at most 2ℓ rows, and a number Δ such that 0 ⪯ F − F̃ ⪯ Δ·I  (`certificate`).

    Fast Frequent Directions (Liberty, KDD 2013; Ghashami et al., 1501.01711): rows are appended to a buffer of 2ℓ; when
    it is full, its squared singular values are lowered by the (ℓ+1)-th, which leaves ℓ rows and adds that number to Δ.
    So Δ ≤ tr(F − F_k)/(ℓ + 1 − k) for the best rank-k F_k and every k ≤ ℓ, and while no more than 2ℓ samples, or only ℓ
    independent ones, were seen, F̃ = F. The reduction goes through the 2ℓ×2ℓ Gram matrix in float64.

    One block, or several jointly: with shape (n_total, 1), `append` takes rows that span the modules.
    Rows are float32: a reduction rounds by up to 2⁻²³·‖B‖₂·‖B‖_F, and `rounding` sums this up. It is part of Δ, and the
    left side holds as −rounding·I ⪯ F − F̃.

    State: `rows` [≤ 2ℓ, n] float32, `shrinkage` and `rounding` float64, both as raw sums.
    """

    kind = "lowrank"

    def __init__(self, shape: tuple[int, int], *, rank: int = DEFAULT_RANK, **options: Any):
        super().__init__(shape, **options)
        self.rank = whole("rank", rank)
        self._buffer = torch.empty(0, self.size, dtype=torch.float32, device=self.device)
        self._used = 0
        self._is_view = False
        self._shrinkage = torch.zeros((), dtype=torch.float64, device=self.device)
        self._rounding = torch.zeros((), dtype=torch.float64, device=self.device)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "rank": self.rank}

    @property
    def rows(self) -> Tensor:
        """B [≤ 2ℓ, n] float32, unnormalised: BᵀB approximates Σ g gᵀ. A view, valid until the next update."""
        return self._buffer[: self._used]

    @property
    def certificate(self) -> float:
        """Δ on the scale of F (divided by the normaliser), with the rounding allowance included."""
        return float(self._shrinkage + self._rounding) / self.normaliser

    @property
    def rounding(self) -> float:
        """The part of `certificate` that stands for float32 rounding: F̃ ⪯ F + rounding·I."""
        return float(self._rounding) / self.normaliser

    def block(self, offset: int, shape: tuple[int, int]) -> LowRank:
        """The sketch of the coordinates [offset, offset + p·q) as a block of shape [p, q], with the same
        certificate: a view, to be read until the next update of this one. ValueError when the columns do not exist."""
        check_columns(offset, shape, self.size)
        view = LowRank(shape, device=self.device, **self.options())
        view._buffer = self.rows[:, offset : offset + view.size]
        view._used, view._is_view, view.counts = self._used, True, self.counts
        view._shrinkage, view._rounding = self._shrinkage, self._rounding
        return view

    @classmethod
    def estimate(cls, shape: tuple[int, int], samples: int, batch: int = 1, **options: Any) -> Estimate:
        return cls._sized(shape[0] * shape[1], samples, options.get("rank", DEFAULT_RANK))

    @staticmethod
    def _sized(n: int, samples: int, rank: int) -> Estimate:
        rank = whole("rank", rank)
        full = 2 * rank
        used = samples if samples <= full else rank + (samples - full - 1) % rank + 1
        shrinking = DOUBLE * 3 * (full * full + min(CHUNK, full * n)) // 2 if samples > full else 0
        return Estimate(SINGLE * n * used + 2 * DOUBLE, SINGLE * n * full + shrinking)

    @classmethod
    def rows_for(cls, samples: int, **options: Any) -> int:
        return min(samples, 2 * whole("rank", options.get("rank", DEFAULT_RANK)))

    @classmethod
    def spans(cls, **options: Any) -> bool:
        return True

    def _append(self, rows: Tensor) -> None:
        done = 0
        while done < len(rows):
            space = self._space(len(rows) - done)
            space.copy_(rows[done : done + len(space)])
            done += len(space)

    def compress(self) -> None:
        """Reduce the buffer to at most ℓ rows now, for example before saving."""
        if self._used > self.rank:
            self._shrink()

    def _space(self, wanted: int) -> Tensor:
        """Up to `wanted` rows of the buffer for writing; at least one."""
        if self._is_view:
            raise RuntimeError("this is a view of one block of a joint Fisher: update the joint Fisher instead")
        if not len(self._buffer):
            self._buffer = torch.empty(2 * self.rank, self.size, dtype=torch.float32, device=self.device)
        if self._used == len(self._buffer):
            self._shrink()
        begin = self._used
        self._used = min(len(self._buffer), begin + wanted)
        return self._buffer[begin : self._used]

    def _update(self, batch: TokenBatch) -> None:
        if batch.rows is not None:
            self._append(batch.rows)
            return
        from sst_kernels.ops import factor_rows

        done = 0
        while done < len(batch.spans):
            space = self._space(len(batch.spans) - done)
            part = slice(done, done + len(space))
            factor_rows(batch.left, batch.right, batch.spans[part], batch.scale[part], space)
            done += len(space)

    def _shrink(self) -> None:
        rows = self._buffer[: self._used]
        values, vectors = torch.linalg.eigh(rows_inner(rows))
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        self._rounding += 2 * UNIT * (values[0] * values.sum()).sqrt()
        lost, kept = values[self.rank], values[: self.rank]
        self._shrinkage += lost
        mix = vectors[:, : self.rank] * ((kept - lost) / kept.clamp_min(1e-300)).clamp_min(0).sqrt()
        step = max(1, CHUNK // len(rows))
        for i in range(0, self.size, step):
            columns = rows[:, i : i + step]
            columns[: self.rank] = (mix.mT @ columns.double()).float()
        self._used = self.rank

    def _merge(self, other: Self) -> None:
        self._shrinkage += other._shrinkage.to(self.device)
        self._rounding += other._rounding.to(self.device)
        self._append(other.rows.to(self.device))

    def reduction(self) -> Reduction:
        """Sketch the sketches of all ranks, in rank order: what merging them one by one gives, certificate included."""
        yield Sum([self._shrinkage, self._rounding])
        pieces = yield Gather(self.rows.clone())
        self._used = 0
        for piece in pieces:
            self._append(piece)

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "shrinkage": self._shrinkage, "rounding": self._rounding}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._used = 0
        self._shrinkage = state["shrinkage"].to(self.device, copy=True)
        self._rounding = state["rounding"].to(self.device, copy=True)
        self._append(state["rows"].to(self.device))

    def matvec(self, vectors: Tensor) -> Tensor:
        return rows_gramian(self.rows, vectors) / self.normaliser

    def quadratic(self, vectors: Tensor) -> Tensor:
        return rows_times(self.rows, vectors).square().sum(0) / self.normaliser

    def operator(self) -> Any:
        """`LowRank(B / √count)`, undamped."""
        from sst_kernels.gevp.operators import LowRank as LowRankOperator

        return LowRankOperator(self.rows.double() / self.normaliser**0.5)
