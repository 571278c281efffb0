"""One forward pass and what its backward has brought so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sst_kernels.fisher.base import Counts
from sst_kernels.fisher.later import Later
from sst_kernels.fisher.lora import LoraSite
from sst_kernels.fisher.loss import Layout
from sst_kernels.ops import core_outer


def flat_tokens(name: str, tensor: Tensor, n: int, length: int) -> Tensor:
    """What module `name` saw of a batch [N, T] as [N·T, ·], float64 as float32. ValueError where tokens were routed, pooled or turned."""
    if tensor.ndim == 3 and n != length and tuple(tensor.shape[:2]) == (length, n):
        raise ValueError(f"{name} saw its tokens as [T, N] = {(length, n)}: only [N, T] models are supported")
    flat = tensor.reshape(-1, tensor.shape[-1])
    if len(flat) != n * length:
        raise ValueError(
            f"{name} saw {len(flat)} tokens where the batch has {n} x {length}: modules that see "
            "routed or pooled tokens (mixture-of-experts, poolers) cannot be attributed to samples; leave them out with modules="
        )
    return flat.float() if flat.dtype == torch.float64 else flat


class Pass:
    """One forward pass and what its backward has brought so far."""

    def __init__(
        self,
        index: int,
        layout: Layout,
        divisor: float,
        grad_scale: float | None,
        source: str,
        groups: Sequence[int] | None,
    ):
        self.index, self.layout, self.divisor, self.grad_scale = index, layout, divisor, grad_scale
        self.source, self.groups = source, groups
        self.seen: set[str] = set()
        self.claimed: set[str] = set()
        self.done: dict[str, Any] = {}
        self.later = Later()
        self.complete = False
        self.schedule: list[str] = []  # the losses of `evidence`: one backward pass each
        self.finished: list[Tensor] = []  # rows [N, ·] of those that have arrived
        self.rows: Tensor | None = None  # and of the one under way
        self.known: set[str] = set()  # modules whose moments hold this batch
        self.counts = Counts(layout.samples, layout.tokens, int(layout.labels.sum()))
        self._measured: Tensor | None = None
        self._spans: dict[torch.device, Tensor] = {}
        self._scales: dict[torch.device, Tensor] = {}

    def again(self) -> None:
        """Another backward pass through the same forward pass will follow, of a loss of its own."""
        self.done.clear()
        self.claimed.clear()
        self._measured = None
        self._scales.clear()

    def watch(self, loss: Tensor) -> None:
        """Measure ∂(what backward was called on)/∂loss when the backward pass enters at `loss`."""
        loss.register_hook(self._measure)

    def _measure(self, grad: Tensor) -> None:
        self._measured = grad.detach().float()

    def flat(self, site: LoraSite, tensor: Tensor) -> Tensor:
        return flat_tokens(site.name, tensor, self.layout.batch, self.layout.length)

    def core_rows(self, sites: Sequence[LoraSite]) -> Tensor:
        """∂L/∂S of all samples and modules, [N, Σ r²] float32 where the first module computes: one `core_outer` per device."""
        by_device: dict[torch.device, list[LoraSite]] = {}
        for site in sites:
            by_device.setdefault(self.done[site.name][0].device, []).append(site)
        parts = {}
        for where, members in by_device.items():
            es, hs = zip(*(self.done[site.name] for site in members))
            out = torch.empty(self.layout.samples, sum(s.rank**2 for s in members), device=where)
            parts[where] = core_outer(es, hs, self.spans(where), self.scale(where), out)
        first = next(iter(parts))
        if len(parts) == 1:
            return parts[first]
        pieces = {
            s.name: p
            for where, members in by_device.items()
            for s, p in zip(members, parts[where].split([s.rank**2 for s in members], 1))
        }
        return torch.cat([pieces[site.name].to(first) for site in sites], 1)

    def spans(self, device: torch.device) -> Tensor:
        """Token ranges of the samples [N, 2], copied to each device once."""
        if device not in self._spans:
            self._spans[device] = self.layout.spans.to(device, non_blocking=True)
        return self._spans[device]

    def scale(self, device: torch.device) -> Tensor:
        """What turns the autograd gradients of the samples into those of their summed losses, [N]."""
        if device not in self._scales:
            factor: float | Tensor = self.divisor
            if self.grad_scale is not None:
                factor = self.divisor / self.grad_scale
            elif self._measured is not None:
                factor = self.divisor / self._measured.to(device)
            else:
                raise RuntimeError(
                    f"batch {self.index}: the loss that backward() was called on does not come from the model's own loss, sequence_nll or "
                    "declared_loss, so its scale is unknown: use one of them, or state grad_scale="
                )
            self._scales[device] = torch.ones(self.layout.samples, device=device) * factor
        return self._scales[device]

    def samples_all(self, tokens: Tensor) -> Tensor:
        """Which samples [N] have only true ones among their tokens; `tokens` [S] bool."""
        false = torch.cat([tokens.new_zeros(1, dtype=torch.int64), (~tokens).cumsum(0)])
        spans = self.spans(tokens.device)
        return false[spans[:, 1]] == false[spans[:, 0]]

    def counts_of(self, kept: Tensor) -> Counts:
        spans = self.layout.spans[kept]
        return Counts(len(spans), int((spans[:, 1] - spans[:, 0]).sum()), int(self.layout.labels[kept].sum()))
