"""An open pass: the hooks on a model, the forward passes under way, and the gradients that arrive for them.

    model's forward pre-hook    where samples, tokens and labels lie: a `Pass`
    taps (one a module)         what each module reads and what its backward brings (`taps`)
    last tap of a backward      the pass has all modules: its owner takes it in

`Accumulator` adds what arrives to a Fisher, `evidence.Reading` to the rows and moments of an `Evidence`.
"""

from __future__ import annotations

import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from sst_kernels.distributed import raise_together
from sst_kernels.fisher.lora import LoraSite
from sst_kernels.fisher.loss import current_declaration, named_inputs, read_layout
from sst_kernels.fisher.passes import Pass
from sst_kernels.fisher.taps import BranchTap, LayerTap, Signal, eager

Tap = BranchTap | LayerTap


class Hooks(ABC):
    """The part of an open pass that knows models and losses. Subclasses say what becomes of what arrives.

    Args:
        model: the model without wrappers; sites: its modules that are read.
        reduction, grad_scale, nonfinite, group: see `fisher_accumulate`.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[LoraSite],
        *,
        reduction: str,
        grad_scale: float | None,
        nonfinite: str,
        group: Any = None,
    ):
        self.model, self.sites = model, sites
        self.progress: dict[str, Any] = {}
        self._reduction, self._grad_scale, self._nonfinite, self._group = reduction, grad_scale, nonfinite, group
        self._hooks = ExitStack()
        self._waiting: list[Pass] = []
        self._forward: Pass | None = None
        self._unread: list[tuple[int, Tensor]] = []
        self._batches = 0
        self._resumed = 0
        self._lock = threading.Lock()

    @abstractmethod
    def save_checkpoint(self, path: str | os.PathLike, progress: Mapping[str, Any] | None = None) -> None:
        """Write everything that another pass needs to go on; `progress` (JSON-able) comes back as `.progress`."""

    @abstractmethod
    def _tap(self, site: LoraSite) -> Tap:
        """What reads a module."""

    @abstractmethod
    def _take(self, current: Pass, site: LoraSite, signal: Signal) -> None:
        """What arrived at one module."""

    @abstractmethod
    def _finish(self, current: Pass) -> None:
        """All modules of a backward pass have arrived."""

    @abstractmethod
    def _reduce(self) -> None:
        """Combine over the group."""

    def _settle(self) -> None:
        """Wait for what is under way; raise what a device has found."""
        self._read_flags()

    def __enter__(self) -> Self:
        with ExitStack() as hooks:
            hooks.enter_context(eager(self.model))
            before = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            hooks.callback(before.remove)
            after = self.model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True)
            hooks.callback(after.remove)
            for site in self.sites:
                hooks.enter_context(self._tap(site))
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.close()
        if self._group is None:
            if kind is None:
                self._complete()
        elif error is None or isinstance(error, Exception):
            try:
                if error is None:
                    self._complete()
            except Exception as own:
                error = own
            raise_together(error, self._group)
            self._reduce()

    def _complete(self) -> None:
        self._settle()
        for waiting in self._waiting:
            missing = [site.name for site in self.sites if site.name not in waiting.done]
            if len(missing) < len(self.sites):
                raise RuntimeError(
                    f"batch {waiting.index}: no gradient arrived at {_some(missing)}; each module must be used once between input "
                    "and loss (with reentrant checkpointing call model.enable_input_require_grads())"
                )
        if self._waiting and self._batches > len(self._waiting):
            self._unanswered(len(self._waiting))
        idle = self._batches == 0 and (self._group is not None or self._resumed > 0)
        if self._batches == len(self._waiting) and not idle:
            raise RuntimeError(
                "no hook fired: run model(**batch) of the very model given to this pass, with gradients enabled, and call "
                "backward() on its loss inside the context"
            )
        self._waiting.clear()

    def _unanswered(self, count: int) -> None:
        """So many forward passes were never followed by backward()."""
        warnings.warn(f"{count} forward passes were never followed by backward() and do not count", stacklevel=4)

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._read_flags()
        if not torch.is_grad_enabled():
            return
        inputs = named_inputs(model, args, kwargs)
        declaration = current_declaration()
        if declaration is None:
            labels, reduction, source, groups = inputs.get("labels"), self._reduction, "data", None
            if labels is None:
                raise ValueError(
                    "the forward pass has no labels, so samples and loss scale are unknown: pass labels= to the model, or use "
                    "sequence_nll(model, batch), or compute your loss inside declared_loss(labels)"
                )
        else:
            labels, reduction = declaration.labels, declaration.reduction
            source, groups = declaration.source, declaration.groups
        layout = read_layout(inputs, labels)
        given = inputs.get("num_items_in_batch") if declaration is None else None
        divisor = float(given or layout.loss_labels) if reduction == "mean" else 1.0
        if groups is not None and len(groups) != layout.samples:
            raise ValueError(
                f"groups must hold one integer for each of the {layout.samples} samples of the batch, got {len(groups)}"
            )
        self._forward = Pass(self._resumed + self._batches, layout, divisor, self._grad_scale, source, groups)
        self._batches += 1
        self._waiting.append(self._forward)
        if declaration is not None:
            declaration.watchers.append(self._forward.watch)

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        current, self._forward = self._forward, None
        loss = getattr(output, "loss", None)
        if current is not None and isinstance(loss, Tensor) and loss.requires_grad:
            current.watch(loss)

    def see(self, site: LoraSite, x: Tensor, kept: Tensor) -> None:
        """See `taps.Owner`."""
        current = self._forward
        if current is None:  # computed again, or without gradients from the start
            return
        if site.name in current.seen:
            raise ValueError(
                f"{site.name} was called twice in one forward pass: shared (tied) modules are not supported"
            )
        current.seen.add(site.name)
        self._look(current, site, kept)

    def _look(self, current: Pass, site: LoraSite, kept: Tensor) -> None:  # noqa: B027 (nothing to do for most)
        """What a module reads, in the forward pass."""

    def claim(self, site: LoraSite) -> Pass | None:
        """See `taps.Owner`."""
        current = self._forward
        if current is None:
            open_passes = [p for p in self._waiting if not p.complete]
            if not open_passes:
                raise RuntimeError(
                    f"{site.name} ran outside a forward pass of the model given to this pass: call that model itself"
                )
            current = open_passes[-1]
            if site.name in current.claimed:
                return None
            if len(open_passes) > 1:
                raise RuntimeError(
                    "several forward passes wait for backward() under reentrant checkpointing: call backward() after each"
                )
        elif site.name in current.claimed:
            raise ValueError(
                f"{site.name} was called twice in one forward pass: shared (tied) modules are not supported"
            )
        current.claimed.add(site.name)
        return current

    def receive(self, current: Pass, site: LoraSite, signal: Signal) -> None:
        """See `taps.Owner`."""
        with self._lock:
            if current.complete or site.name in current.done:
                raise RuntimeError(
                    f"batch {current.index}: backward() ran twice through the same forward pass, which would count it twice"
                )
            self._take(current, site, signal)
            if len(current.done) == len(self.sites):
                self._finish(current)

    def _close(self, current: Pass) -> None:
        """No further backward pass is expected of this forward pass."""
        current.complete = True
        self._waiting.remove(current)
        current.done = dict.fromkeys(current.done)

    def _between_batches(self) -> None:
        """RuntimeError inside a batch: a checkpoint would hold a part of it."""
        if any(waiting.claimed for waiting in self._waiting):
            raise RuntimeError("a checkpoint is taken between batches: call backward() on the open forward pass first")

    def _read_flags(self) -> None:
        """Look at the finished batches' finite flags, one batch behind, so that the device is never waited for in mid-pass."""
        unread, self._unread = self._unread, []
        for index, bad in unread:
            samples = bad.nonzero().flatten().tolist()
            if samples:
                raise FloatingPointError(
                    f"batch {index}: the gradients of samples {samples} are not finite, and the Fisher holds them: accumulate again "
                    'without them, with nonfinite="skip", or with a smaller loss scale (fp16)'
                )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
