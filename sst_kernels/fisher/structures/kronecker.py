"""K-FAC: the Fisher of a block as one Kronecker product of a left and a right second moment."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from sst_kernels.fisher.base import Structure, TokenBatch
from sst_kernels.fisher.estimate import Estimate, estimate_moments
from sst_kernels.fisher.later import Later
from sst_kernels.fisher.structures.algebra import kron_times, nearest_psd, psd_eigh, symmetric
from sst_kernels.fisher.structures.moment import add_moment
from sst_kernels.memo import Memo

Side = tuple[Tensor, Tensor | None, Tensor | None]  # x, spans, scale


def token_factors(batch: TokenBatch, approx: str) -> tuple[Side, Side, int]:
    """What the two second moments are summed over: `(x, spans, scale)` of the left and the right side, and the number
    of terms of the right sum.

    expand: all tokens of all spans. reduce: per sample Σ_t left_t (scaled) and the mean of right_t.
    """
    if approx == "expand":
        return (batch.left, batch.spans, batch.scale), (batch.right, batch.spans, None), batch.counts.tokens
    lengths = batch.spans[:, 1] - batch.spans[:, 0]
    left = _span_sums(batch.left, batch.spans, batch.scale)
    right = _span_sums(batch.right, batch.spans, 1.0 / lengths.clamp_min(1).float())
    return (left, None, None), (right, None, None), len(batch.spans)


def _span_sums(x: Tensor, spans: Tensor, scale: Tensor) -> Tensor:
    from sst_kernels.ops import factor_rows

    out = torch.empty(len(spans), x.shape[1], dtype=torch.float32, device=x.device)
    return factor_rows(x, x.new_ones(len(x), 1), spans, scale, out)


class TwoSided(Structure):
    """A structure of two factors, F = 1/count · (Σ left leftᵀ) ⊗ (mean of right rightᵀ), each estimated from tokens.

    Row-major, vec(l rᵀ) = l ⊗ r, so the left (gradient) factor comes first. With left and right independent over tokens
    and the left gradients of different tokens uncorrelated,

        Σ_n E[vec(G_n) vec(G_n)ᵀ] = Σ_n Σ_t E[l lᵀ] ⊗ E[r rᵀ] = (Σ_{n,t} l lᵀ) ⊗ (Σ_{n,t} r rᵀ / #tokens)    expand
        G_n ≈ (Σ_t l_t)(mean_t r_t)ᵀ:   (Σ_n l_n l_nᵀ) ⊗ (Σ_n r_n r_nᵀ / #samples)                              reduce

    (`expand` and `reduce` of Eschenhagen et al., 2311.00636.) `scale` of the batch goes into the left factor.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        device: torch.device | str = "cpu",
        sample: str = "sequence",
        count: str = "sequences",
        approx: str = "expand",
    ):
        super().__init__(shape, device=device, sample=sample, count=count)
        if approx not in ("expand", "reduce"):
            raise ValueError(f'approx: expected "expand" or "reduce", got {approx!r}')
        self.approx = approx
        self._terms = torch.zeros((), dtype=torch.int64)  # on the host: counted without a launch

    def options(self) -> dict[str, Any]:
        return {**super().options(), "approx": self.approx}

    @classmethod
    def estimate(cls, shape: tuple[int, int], samples: int, batch: int = 1, **options: Any) -> Estimate:
        return estimate_moments([(d, cls._columns(d, **options)) for d in shape])

    @classmethod
    def _columns(cls, d: int, **options: Any) -> int:
        """Of how many columns a factor of order d is kept."""
        return d

    def _update(self, batch: TokenBatch) -> None:
        (left, spans, scale), (right, right_spans, right_scale), terms = token_factors(batch, self.approx)
        self._add_left(left, spans, scale, batch.later)
        self._add_right(right, right_spans, right_scale, batch.later)
        self._terms += terms

    @abstractmethod
    def _add_left(self, x: Tensor, spans: Tensor | None, scale: Tensor | None, later: Later | None) -> None: ...

    @abstractmethod
    def _add_right(self, x: Tensor, spans: Tensor | None, scale: Tensor | None, later: Later | None) -> None: ...

    @abstractmethod
    def eigenbases(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors of the left [p, p'] and the right factor [q, q'], leading first, float64."""

    def _merge(self, other: Self) -> None:
        for mine, theirs in zip(self.state_dict().values(), other.state_dict().values(), strict=True):
            mine += theirs.to(mine.device)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


_last_input = (
    Memo()
)  # (its product or None, who read it): modules that read one tensor (q, k, v; gate, up) come one after another


class Kronecker(TwoSided):
    """K-FAC (Martens & Grosse 1503.05671) with both factors dense: 4·(p² + q²) bytes.

    State: `left` [p, p], `right` [q, q] float32 raw sums (lower triangles), `terms` int64 behind the right sum.
    """

    kind = "kronecker"

    def __init__(self, shape: tuple[int, int], **options: Any):
        super().__init__(shape, **options)
        p, q = self.shape
        self._left = torch.zeros(p, p, dtype=torch.float32, device=self.device)
        self._right = torch.zeros(q, q, dtype=torch.float32, device=self.device)
        self._followed = False  # an earlier batch showed that the next module reads the same right side

    def _add_left(self, x: Tensor, spans: Tensor | None, scale: Tensor | None, later: Later | None) -> None:
        add_moment(x, spans, scale, self._left, later)

    def _add_right(self, x: Tensor, spans: Tensor | None, scale: Tensor | None, later: Later | None) -> None:
        """The product of a wide side serves all modules that read it. Only where another follows is it formed apart from the
        sum, which costs d² numbers written and read again: else it is added in place. Both give the same bits."""
        from sst_kernels.ops import gram

        if self.shape[1] <= self.shape[0]:
            add_moment(x, spans, scale, self._right, later)
            return
        product = None
        if _last_input.holds(x, spans):
            product, reader = _last_input.value
            if before := reader():
                before._followed = True
        if product is None and self._followed:
            product = gram(x, spans, None, torch.zeros_like(self._right))
        if product is None:
            gram(x, spans, None, self._right)
        else:
            self._right += product
        _last_input.keep((product if self._followed else None, weakref.ref(self)), x, spans)

    def factors(self) -> tuple[Tensor, Tensor]:
        """G [p, p] and A [q, q], float64 and PSD, with F = G ⊗ A. One eigendecomposition each."""
        left, right = nearest_psd(symmetric(self._left)), nearest_psd(symmetric(self._right))
        return left / self.normaliser, right / max(1, int(self._terms))

    def eigenbases(self) -> tuple[Tensor, Tensor]:
        return psd_eigh(symmetric(self._left))[1], psd_eigh(symmetric(self._right))[1]

    def state_dict(self) -> dict[str, Tensor]:
        return {"left": self._left, "right": self._right, "terms": self._terms}

    def matvec(self, vectors: Tensor) -> Tensor:
        return kron_times(*self.factors(), vectors.to(self.device, torch.float64))

    def operator(self) -> Any:
        """`Kronecker(G, A)`, undamped."""
        from sst_kernels.gevp.operators import Kronecker as KroneckerOperator

        return KroneckerOperator(*self.factors())
