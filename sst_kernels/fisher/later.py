"""What modules of a batch can share launches for waits for its end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Later:
    """Sums of one batch, of many modules: second moments of narrow sides, and products that several modules add to theirs.

    At 7B they would be some 1 500 launches of a few microseconds' work each; `settle`, once all modules have come, takes a dozen.
    Until then the sums lack the batch, and `x` and products are held; of products no more than `most` numbers, beyond which those
    that wait are added at once.
    """

    most = 1 << 26

    def __init__(self) -> None:
        self._sides: dict[tuple[int, int], tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]] = {}
        self._sums: list[Tensor] = []
        self._products: list[Tensor] = []
        self._brought: Sequence[Tensor] = ()
        self._held = 0

    @staticmethod
    def takes(x: Tensor, spans: Tensor | None) -> bool:
        """Whether the moment of x [S, d] is one of `gram`: per-sample moments of d ≤ 64 that take no more numbers than x has."""
        return spans is not None and x.shape[1] <= 64 and len(spans) * x.shape[1] <= len(x)

    def gram(self, x: Tensor, spans: Tensor, scale: Tensor | None, out: Tensor) -> None:
        """Add Σ_n scale_n² Σ_{t in span n} x_t x_tᵀ to `out` [d, d], which is contiguous; `spans` and `scale` are those of the batch."""
        *_, xs, outs = self._sides.setdefault((id(spans), id(scale)), (spans, scale, [], []))
        xs.append(x)
        outs.append(out)

    def add(self, sums: Sequence[Tensor], products: Sequence[Tensor]) -> None:
        """Add each product to its sum."""
        if products is not self._brought:  # by the module before
            self._held += sum(product.numel() for product in products)
            self._brought = products
        self._sums += sums
        self._products += products
        if self._held > self.most:
            self._add_up()

    def settle(self) -> None:
        """Do it all: nothing waits afterwards."""
        from sst_kernels.ops import core_outer

        for spans, scale, xs, outs in self._sides.values():
            rows = torch.empty(len(spans), sum(out.numel() for out in outs), device=spans.device)
            core_outer(xs, xs, spans, None if scale is None else scale.square(), rows)
            totals = rows.sum(0).split([out.numel() for out in outs])
            self.add(outs, [total.view_as(out) for total, out in zip(totals, outs)])
        self._add_up()
        self._sides.clear()

    def _add_up(self) -> None:
        by_kind: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for total, product in zip(self._sums, self._products):
            pair = by_kind.setdefault((total.device, total.dtype), ([], []))
            pair[0].append(total)
            pair[1].append(product)
        for sums, products in by_kind.values():
            torch._foreach_add_(sums, products)
        self._sums, self._products, self._brought, self._held = [], [], (), 0
