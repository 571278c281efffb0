"""The hooks of an open pass.

How one sample's core gradient is read without touching the model (DESIGN: ΔW(S) = c · B S A, S = I is the patch):

    1. a forward hook on `lora_A` sees h = A x and replaces it by u = S h, S being the evaluation point;
    2. a tensor hook on u receives e = ∂L/∂u = c Bᵀ ∂L/∂y, brought by the backward pass that runs anyway;
    3. ∂L/∂S of sample n is Σ_t e_t h_tᵀ: [r, r] from r-vectors only, for all modules in one launch per shape.

Factor space reads x in front of `lora_A` and c·∂L/∂y behind `lora_B` in the same way.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from sst_kernels.distributed import raise_together
from sst_kernels.fisher.base import Joint, TokenBatch
from sst_kernels.fisher.fisher import Fisher
from sst_kernels.fisher.lora import LoraSite
from sst_kernels.fisher.loss import current_declaration, named_inputs, read_layout
from sst_kernels.fisher.passes import Pass
from sst_kernels.fisher.storage import read_tensors, write_tensors
from sst_kernels.fisher.transfer import HostCopies, crosses
from sst_kernels.profiling import stage


class Accumulator:
    """The open pass: `fisher` (mapping from block name to structure), `skipped` sample positions, `save(path)`.

    `progress` is what the last checkpoint was given, {} in a pass that starts from nothing. With the state on the host of a GPU the
    last batches may be on their way: `fisher` and `skipped` wait for them when asked, what was kept of an earlier answer does not.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[LoraSite],
        fisher: Fisher,
        cores: Mapping[str, float | Tensor | None],
        *,
        reduction: str,
        grad_scale: float | None,
        nonfinite: str,
        group: Any = None,
    ):
        self.model, self.sites, self._fisher = model, sites, fisher
        self._skipped: list[tuple[int, int]] = []
        self.progress: dict[str, Any] = {}
        self._group = group
        self._cores = cores
        self._factor = fisher.meta["space"] == "factor"
        self._reduction, self._grad_scale, self._nonfinite = reduction, grad_scale, nonfinite
        self._handles: list[Any] = []
        self._waiting: list[Pass] = []
        self._forward: Pass | None = None
        self._unread: list[tuple[int, Tensor]] = []
        self._batches = 0
        self._resumed = 0
        self._copies = HostCopies()
        self._entering: int | None = None  # the batch whose rows are being added
        self._lock = threading.Lock()

    @property
    def fisher(self) -> Fisher:
        """What has been accumulated."""
        self._drain()
        return self._fisher

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """(batch, sample) of the samples that nonfinite="skip" left out."""
        self._drain()
        return self._skipped

    def _drain(self) -> None:
        with self._lock:
            self._copies.drain()

    def __enter__(self) -> Self:
        hook = self._handles.append
        hook(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        hook(self.model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True))
        for site in self.sites:
            hook(site.lora_a.register_forward_hook(partial(self._at_lora_a, site)))
            if self._factor:
                hook(site.lora_b.register_forward_hook(partial(self._at_lora_b, site)))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._group is None:
            if kind is None:
                self._complete()
        elif error is None or isinstance(error, Exception):
            self._complete_together(error)

    def _complete_together(self, error: Exception | None) -> None:
        try:
            if error is None:
                self._complete()
        except Exception as own:
            error = own
        raise_together(error, self._group)
        self._fisher.all_reduce(self._group)

    def _complete(self) -> None:
        self._drain()
        self._read_flags()
        for waiting in self._waiting:
            missing = [site.name for site in self.sites if site.name not in waiting.done]
            if len(missing) < len(self.sites):
                raise RuntimeError(
                    f"batch {waiting.index}: no gradient arrived at {_some(missing)}; each module must be used once between input "
                    "and loss (with reentrant checkpointing call model.enable_input_require_grads())"
                )
        if self._waiting and self._batches > len(self._waiting):
            warnings.warn(
                f"{len(self._waiting)} forward passes were never followed by backward() and do not count", stacklevel=3
            )
        idle = self._batches == 0 and (self._group is not None or self._resumed > 0)
        if self._batches == len(self._waiting) and not idle:
            raise RuntimeError(
                "no hook fired: run model(**batch) of the very model given to fisher_accumulate, with gradients enabled, and call "
                "backward() on its loss inside the context"
            )
        self._waiting.clear()

    def save(self, path: str | os.PathLike) -> None:
        """Write the Fisher to a safetensors file (see `Fisher.save`)."""
        self.fisher.save(path)

    def save_checkpoint(self, path: str | os.PathLike, progress: Mapping[str, Any] | None = None) -> None:
        """Write everything that `fisher_accumulate(..., resume=path)` needs to go on, atomically.

        Call it between batches. `progress` (JSON-able) comes back as `.progress`: which batch is next, for instance. A resumed
        pass gives the same bits as an uninterrupted one when its remaining batches, and their label draws, are the same.
        Raises FloatingPointError for non-finite gradients not yet reported, RuntimeError inside a batch, and StorageError.
        """
        self._drain()
        self._read_flags()
        if any(waiting.claimed for waiting in self._waiting):
            raise RuntimeError("a checkpoint is taken between batches: call backward() on the open forward pass first")
        header, tensors = self._fisher.pack()
        about = {"batches": self._resumed + self._batches, "skipped": self._skipped, "progress": dict(progress or {})}
        write_tensors(path, tensors, {"kind": "checkpoint", **header, "accumulator": about})

    def load_checkpoint(self, path: str | os.PathLike) -> None:
        """Take over the state of a checkpoint of the same pass (`resume=` does this).

        Raises FileNotFoundError, or ValueError when the file is damaged or belongs to another pass.
        """
        header, tensors = read_tensors(path)
        if header.get("kind") != "checkpoint":
            raise ValueError(
                f"{path} holds a {header.get('kind')!r}, expected a checkpoint: load a Fisher with Fisher.load"
            )
        try:
            self._fisher.unpack(header, tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        about = header["accumulator"]
        self._skipped = [tuple(position) for position in about["skipped"]]
        self.progress, self._resumed = about["progress"], about["batches"]

    def abandon(self) -> None:
        """Forget forward passes whose backward failed (out of memory), so that their batch can be run again in pieces.

        MemoryError when the Fisher may have taken in a part of such a batch (a streaming structure, or a joint one that could not
        grow or be reduced): resume from a checkpoint then.
        """
        torn = [w.index for w in self._waiting if w.done and self._fisher.joint is None]
        torn += [self._entering] if self._entering is not None else []
        if torn:
            raise MemoryError(
                f"batch {torn[0]} failed halfway, and the Fisher may hold a part of it: go on from the last checkpoint, or start again, with "
                'smaller batches or state_device="cpu"'
            )
        self._batches -= len(self._waiting)
        self._waiting.clear()
        self._forward = None

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
            labels, reduction, source, groups = (
                declaration.labels,
                declaration.reduction,
                declaration.source,
                declaration.groups,
            )
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

    def _at_lora_a(self, site: LoraSite, module: nn.Module, args: tuple, h: Tensor) -> Tensor:
        u = self._at_point(site, h)
        if not torch.is_grad_enabled():
            return u
        u = u if u.requires_grad else u.detach().requires_grad_()
        current = self._claim(site, "a")
        if current is not None:
            x = args[0].detach() if self._factor else None
            u.register_hook(partial(self._on_e, current, site, h.detach(), x))
        return u

    def _at_lora_b(self, site: LoraSite, module: nn.Module, args: tuple, y: Tensor) -> None:
        if torch.is_grad_enabled() and y.requires_grad:
            current = self._claim(site, "b")
            if current is not None:
                y.register_hook(partial(current.outputs.__setitem__, site.name))

    def _claim(self, site: LoraSite, part: str) -> Pass | None:
        """The pass this call of the module belongs to, or None when it only recomputes one that has its hook already."""
        current = self._forward
        if current is None:
            open_passes = [p for p in self._waiting if not p.complete]
            if not open_passes:
                raise RuntimeError(
                    f"{site.name} ran outside a forward pass of the model given to fisher_accumulate: call that model itself"
                )
            current = open_passes[-1]
            if (site.name, part) in current.claimed:
                return None
            if len(open_passes) > 1:
                raise RuntimeError(
                    "several forward passes wait for backward() under reentrant checkpointing: call backward() after each"
                )
        elif (site.name, part) in current.claimed:
            raise ValueError(
                f"{site.name} was called twice in one forward pass: shared (tied) modules are not supported"
            )
        current.claimed.add((site.name, part))
        return current

    def _at_point(self, site: LoraSite, h: Tensor) -> Tensor:
        core = self._cores[site.name]
        if core is None:
            return h
        if isinstance(core, float):
            return torch.zeros_like(h) if core == 0 else h * core
        return h @ core.to(h).T

    def _on_e(self, current: Pass, site: LoraSite, h: Tensor, x: Tensor | None, e: Tensor) -> None:
        with self._lock, torch.no_grad():
            if site.name in current.done:
                raise RuntimeError(
                    f"batch {current.index}: backward() ran twice through the same forward pass, which would count it twice"
                )
            e, h = (current.flat(site, t) for t in (e.detach(), h))
            if self._fisher.joint is not None:
                current.done[site.name] = (e, h)
            else:
                current.done[site.name] = e.sum(1, dtype=torch.float32)
                self._update_blocks(current, site, e, h, x)
            if len(current.done) == len(self.sites):
                self._finish(current)

    def _update_blocks(self, current: Pass, site: LoraSite, e: Tensor, h: Tensor, x: Tensor | None) -> None:
        if x is None:
            sides = {site.name: (e, h)}
        else:
            g = current.outputs.pop(site.name)
            sides = {
                f"{site.name}.lora_A": (e, current.flat(site, x)),
                f"{site.name}.lora_B": (current.flat(site, g), h),
            }
        for name, (left, right) in sides.items():
            holder = self._fisher[name]
            leaves = crosses(left.device, holder.device)
            if not leaves:
                left, right = left.to(holder.device), right.to(holder.device)
            batch = TokenBatch(left, right, current.spans(left.device), current.scale(left.device), current.counts)
            if leaves:
                self._copies.add(holder, batch)
            else:
                holder.update(batch)

    @stage("fisher")
    def _finish(self, current: Pass) -> None:
        current.complete = True
        self._waiting.remove(current)
        joint = self._fisher.joint
        if joint is None:
            tokens = torch.stack([t.to(self.sites[0].device) for t in current.done.values()])
            self._unread.append((current.index, ~current.samples_all(tokens.isfinite().all(0))))
            current.done = dict.fromkeys(current.done)
            self._fisher.note(current.source, current.layout.samples, current.groups)
            return
        rows = current.core_rows(self.sites)
        current.done = dict.fromkeys(current.done)
        if crosses(rows.device, joint.device):
            self._copies.send([rows], partial(self._take, joint, current))
        else:
            self._take(joint, current, rows.to(joint.device))

    def _take(self, joint: Joint, current: Pass, rows: Tensor) -> None:
        """Add the rows of a batch, on the device of `joint`."""
        finite = rows.isfinite().all(1)
        counts, groups = current.counts, current.groups
        if self._nonfinite == "raise":
            self._unread.append((current.index, ~finite))
        elif not (kept := finite.cpu()).all():
            self._skipped += [(current.index, i) for i in (~kept).nonzero().flatten().tolist()]
            rows, counts = rows[finite], current.counts_of(kept)
            groups = None if groups is None else [g for g, keep in zip(groups, kept.tolist()) if keep]
        n = len(rows)
        empty, spans = rows.new_empty(0, 1), torch.zeros(n, 2, dtype=torch.int64, device=rows.device)
        self._entering = current.index
        joint.update(TokenBatch(empty, empty, spans, rows.new_ones(n), counts, rows))
        self._entering = None
        self._fisher.note(current.source, n, groups)

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
