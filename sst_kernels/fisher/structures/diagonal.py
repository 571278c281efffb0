"""The diagonal of the Fisher, and the variance of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from sst_kernels.distributed import Reduction, Sum
from sst_kernels.fisher.base import Joint, TokenBatch
from sst_kernels.fisher.estimate import DOUBLE, SINGLE, Estimate, gradients_held
from sst_kernels.fisher.structures.rows import check_columns


class Diagonal(Joint):
    """F = diag(1/count · Σ_n g_n²): the importances of EWC (1612.00796), FILA and diagonal Laplace. No g_n is stored.

    `centred=False` (default) keeps Σ g², 4 bytes per coordinate. `centred=True` keeps Σ g and the sum of squared
    deviations M₂ = Σ (g − ḡ)² instead, 8 bytes, and adds `variance()`. Each batch joins by the pairwise update of Chan,
    Golub & LeVeque (1983), so the variance never is the difference of two large running sums, and
    Σ g² = M₂ + (Σ g)²/N is a sum of non-negative terms. All sums are float32, whatever the dtype of the gradients.

    State: `square` [p, q] float32, or `sum`, `deviation` [p, q] float32 and `samples` int64, the N above.
    """

    kind = "diagonal"

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        device: torch.device | str = "cpu",
        sample: str = "sequence",
        count: str = "sequences",
        centred: bool = False,
    ):
        super().__init__(shape, device=device, sample=sample, count=count)
        self.centred = bool(centred)
        self._sum = self._zeros() if centred else torch.empty(0)
        self._square = self._zeros()  # Σ g², or M₂ when centred
        self._samples = 0

    def _zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.float32, device=self.device)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "centred": self.centred}

    @classmethod
    def estimate(cls, shape: tuple[int, int], samples: int, batch: int = 1, **options: Any) -> Estimate:
        n, centred = shape[0] * shape[1], options.get("centred", False)
        state = 2 * SINGLE * n + DOUBLE if centred else SINGLE * n
        return Estimate(state, state + SINGLE * n * (gradients_held(*shape, batch) + 2 * centred))

    def _update(self, batch: TokenBatch) -> None:
        from sst_kernels.ops import factor_moments

        if batch.rows is not None:
            self._append(batch.rows)
        elif self.centred:
            total, square = self._zeros(), self._zeros()
            factor_moments(batch.left, batch.right, batch.spans, batch.scale, total, square)
            self._join_sums(total, square, len(batch.spans))
        else:
            factor_moments(batch.left, batch.right, batch.spans, batch.scale, None, self._square)

    def _append(self, rows: Tensor) -> None:
        rows = rows.to(self.device, torch.float32)
        square = rows.square().sum(0).reshape(self.shape)
        if not self.centred:
            self._square += square
        elif len(rows):
            self._join_sums(rows.sum(0).reshape(self.shape), square, len(rows))

    def _join_sums(self, total: Tensor, square: Tensor, n: int) -> None:
        """Add `n` samples with sum `total` and sum of squares `square`."""
        self._join(total, square.sub_(total.square(), alpha=1 / n).clamp_min_(0), n)

    def _join(self, total: Tensor, deviation: Tensor, n: int) -> None:
        """Add `n` samples with sum `total` and squared deviations `deviation` from their own mean."""
        mine = self._samples
        self._square += deviation
        if mine and n:
            shift = torch.sub(total, self._sum, alpha=n / mine)  # n times the distance of the means
            self._square.addcmul_(shift, shift, value=mine / (n * (mine + n)))
        self._sum += total
        self._samples = mine + n

    def _merge(self, other: Self) -> None:
        if self.centred:
            self._join(other._sum.to(self.device), other._square.to(self.device), other._samples)
        else:
            self._square += other._square.to(self.device)

    def reduction(self) -> Reduction:
        """Exact: sums add, and squared deviations add after each rank has moved its own to the common mean."""
        if self.centred:
            total, samples = self._sum.clone(), torch.tensor(self._samples)
            yield Sum([total, samples])
            shift = self._sum / max(1, self._samples) - total / max(1, int(samples))
            self._square += shift.square_() * self._samples
            self._sum, self._samples = total, int(samples)
        yield Sum([self._square])

    def state_dict(self) -> dict[str, Tensor]:
        if self.centred:
            return {"sum": self._sum, "deviation": self._square, "samples": torch.tensor(self._samples)}
        return {"square": self._square}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.centred:
            self._sum = state["sum"].to(self.device, copy=True)
            self._samples = int(state["samples"])
        self._square = state["deviation" if self.centred else "square"].to(self.device, copy=True)

    def block(self, offset: int, shape: tuple[int, int]) -> Diagonal:
        """The coordinates [offset, offset + p·q) as a block of shape [p, q], a view to be read. ValueError when they do
        not exist."""
        check_columns(offset, shape, self.size)
        view = type(self)(shape, device=self.device, **self.options())
        for name in ("_sum", "_square") if self.centred else ("_square",):
            setattr(view, name, getattr(self, name).reshape(-1)[offset : offset + view.size].reshape(shape))
        view._samples, view.counts = self._samples, self.counts
        return view

    def mean(self) -> Tensor:
        """The mean gradient per sample [p, q], float64."""
        self._require_centred("mean")
        return self._sum.double() / self._samples

    def variance(self) -> Tensor:
        """The population variance of the gradient over samples [p, q], float64 (divided by N whatever `count` is)."""
        self._require_centred("variance")
        return self._square.double() / self._samples

    def _require_centred(self, what: str) -> None:
        if not self.centred:
            raise ValueError(f"this diagonal Fisher kept no mean: accumulate with centred=True to ask for its {what}")
        if not self._samples:
            raise ValueError(f"this diagonal Fisher holds no samples: run backward passes before asking its {what}")

    def diagonal(self) -> Tensor:
        """The diagonal of F [p, q], float64."""
        square = self._square.double()
        if self.centred:
            square = square + self._sum.double().square() / max(1, self._samples)
        return square / self.normaliser

    def matvec(self, vectors: Tensor) -> Tensor:
        v = vectors.to(self.device, torch.float64)
        return self.diagonal().reshape(-1, *[1] * (v.ndim - 1)) * v

    def operator(self) -> Any:
        """`Diagonal(diagonal)`."""
        from sst_kernels.gevp.operators import Diagonal as DiagonalOperator

        return DiagonalOperator(self.diagonal().reshape(-1))
