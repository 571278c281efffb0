"""Where a pass reads one LoRA module, for ΔW(S) = c · B S A at the evaluation point S.

`LayerTap`, at the reference point S = 0. Nothing that the patch reads changes the forward pass there, so its branch is not computed
at all: the adapter is taken out of the layer's active ones, and

    forward    x in front of the layer is seen; what the pass keeps of it (h = x Aᵀ, x itself, or x Qᵀ) is saved
    backward   g = ∂L/∂y behind the layer arrives, and with it e = c Bᵀ g

by an autograd function on y that is the identity. What it saves goes through autograd's own hooks, so that gradient checkpointing
keeps nothing here and recomputes it. Where nothing in front of the layer wants a gradient, the graph starts here.

`BranchTap`, at any other point, where the branch runs:

    1. a forward hook on `lora_A` sees h = A x and replaces it by u = S h;
    2. a tensor hook on u receives e = ∂L/∂u = c Bᵀ ∂L/∂y, brought by the backward pass that runs anyway;
    3. factor space reads x in front of `lora_A` and c·∂L/∂y behind `lora_B` in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sst_kernels.fisher.lora import LoraSite, whole_weight
from sst_kernels.fisher.passes import Pass


@dataclass
class Signal:
    """What one backward pass brought at one module, token by token, as the model shapes tokens.

    e [..., r] = c Bᵀ ∂L/∂y; right [..., q]: what the tap kept of the input; left [..., d_out] = c ∂L/∂y and h [..., r] = A x where
    factor space wants them.
    """

    e: Tensor
    right: Tensor
    left: Tensor | None = None
    h: Tensor | None = None


class Owner(Protocol):
    """The open pass that taps report to."""

    def claim(self, site: LoraSite) -> Pass | None:
        """The forward pass that this call of the module belongs to; None where it only recomputes one that is known."""

    def see(self, site: LoraSite, x: Tensor, kept: Tensor) -> None:
        """A module of the forward pass under way reads x; also where gradients are off."""

    def receive(self, current: Pass, site: LoraSite, signal: Signal) -> None:
        """What the backward pass brought."""


class LayerTap:
    """Reads a module at the reference point.

    Args:
        columns: [q, d_in], what is kept of x is x · columnsᵀ; None keeps x.
        exact: whether the columns count to more digits than x has: they enter as the sum of two parts in x's dtype then.
        factor: whether c·∂L/∂y and h are wanted beside e and x.
    """

    def __init__(
        self, owner: Owner, site: LoraSite, columns: Tensor | None, *, exact: bool = False, factor: bool = False
    ):
        self.owner, self.site, self.factor = owner, site, factor
        self._columns = columns
        self._rest = columns if exact else None
        self._into_e = site.scaling * whole_weight(site.lora_b)
        self._a = whole_weight(site.lora_a) if factor else None
        self._active: Any = None

    @staticmethod
    def fits(site: LoraSite) -> bool:
        """Whether the layer has a list of active adapters (PEFT) that this one can be left out of."""
        return hasattr(site.layer, "_active_adapter")

    def __enter__(self) -> None:
        layer: Any = self.site.layer
        _refuse_others(self.site, (LayerTap, BranchTap))
        adapter = next(name for name, part in layer.lora_A.items() if part is self.site.lora_a)
        self._active = layer._active_adapter
        active = [self._active] if isinstance(self._active, str) else list(self._active)
        layer._active_adapter = [name for name in active if name != adapter]
        self._handle = layer.register_forward_hook(self._after)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self.site.layer._active_adapter = self._active  # type: ignore[assignment]

    def _after(self, layer: nn.Module, args: tuple, y: Tensor) -> Tensor:
        x = args[0].detach()
        kept = x if self._columns is None else self._times_columns(x)
        self.owner.see(self.site, x, kept)
        if not torch.is_grad_enabled():
            return y
        current = self.owner.claim(self.site)
        y = y if y.requires_grad else y.detach().requires_grad_()
        return _Identity.apply(y, kept, partial(self._arrived, current))

    def _arrived(self, current: Pass | None, g: Tensor, kept: Tensor) -> None:
        if current is None:
            return
        e = g @ self._cast("_into_e", g)
        if not self.factor:
            return self.owner.receive(current, self.site, Signal(e, kept))
        left = g if self.site.scaling == 1 else g * self.site.scaling
        self.owner.receive(current, self.site, Signal(e, kept, left, kept @ self._cast("_a", kept).mT))

    def _times_columns(self, x: Tensor) -> Tensor:
        if self._rest is not None and self._rest is self._columns:  # the first call: split them
            narrow = torch.finfo(x.dtype).eps > torch.finfo(self._rest.dtype).eps
            self._rest = self._rest - self._rest.to(x.dtype).to(self._rest) if narrow else None
        kept = x @ self._cast("_columns", x).mT
        return kept if self._rest is None else kept + x @ self._cast("_rest", x).mT

    def _cast(self, name: str, like: Tensor) -> Tensor:
        """A weight in the dtype and place of what it meets: adapters run in the base's dtype."""
        weight = getattr(self, name)
        if weight.dtype != like.dtype or weight.device != like.device:
            weight = weight.to(like)
            setattr(self, name, weight)
        return weight


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, kept: Tensor, arrived: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.arrived = arrived
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        with torch.no_grad():
            ctx.arrived(g, *ctx.saved_tensors)
        return g, None, None


class BranchTap:
    """Reads a module while its branch runs at S = `core`: None for I, a number α for αI, or S [r, r]."""

    def __init__(self, owner: Owner, site: LoraSite, core: float | Tensor | None, *, factor: bool = False):
        self.owner, self.site, self.core, self.factor = owner, site, core, factor
        self._left: dict[int, Tensor] = {}  # by pass: c·∂L/∂y, which comes before e

    def __enter__(self) -> None:
        _refuse_others(self.site, (LayerTap,))
        self._handles = [self.site.lora_a.register_forward_hook(self._at_a)]
        if self.factor:
            self._handles.append(self.site.lora_b.register_forward_hook(self._at_b))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _at_a(self, module: nn.Module, args: tuple, h: Tensor) -> Tensor:
        u = self._at_point(h)
        self._claimed: Pass | None = None
        if not torch.is_grad_enabled():
            return u
        u = u if u.requires_grad else u.detach().requires_grad_()
        self._claimed = current = self.owner.claim(self.site)
        if current is not None:
            u.register_hook(partial(self._arrived, current, h.detach(), args[0].detach() if self.factor else None))
        return u

    def _at_b(self, module: nn.Module, args: tuple, y: Tensor) -> None:
        if self._claimed is not None and y.requires_grad:
            y.register_hook(partial(self._left.__setitem__, self._claimed.index))

    def _at_point(self, h: Tensor) -> Tensor:
        if self.core is None:
            return h
        if isinstance(self.core, float):
            return torch.zeros_like(h) if self.core == 0 else h * self.core
        return h @ self.core.to(h).T

    @torch.no_grad()
    def _arrived(self, current: Pass, h: Tensor, x: Tensor | None, e: Tensor) -> None:
        e = e.detach()
        signal = Signal(e, h) if x is None else Signal(e, x, self._left.pop(current.index), h)
        self.owner.receive(current, self.site, signal)


def _refuse_others(site: LoraSite, kinds: tuple[type, ...]) -> None:
    """RuntimeError where another open pass has switched the adapter off, or would find it switched off."""
    hooks = (*site.layer._forward_hooks.values(), *site.lora_a._forward_hooks.values())
    if any(isinstance(getattr(hook, "__self__", None), kinds) for hook in hooks):
        raise RuntimeError(
            f"another pass is open on {site.name}, and one of the two is taken at the reference point, with the adapter off: leave "
            "its context first"
        )


def eager(model: nn.Module) -> AbstractContextManager:
    """While it is open, what torch.compile has made of modules runs as they are written, so that hooks on them are called.

    Not where attention is a compiled kernel (flex_attention): without it scores would be [T, T].
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if "torch._dynamo" not in sys.modules or attention == "flex_attention":
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
