"""`Accumulator`: the open pass of `fisher_accumulate`, which adds what arrives to a Fisher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sst_kernels.fisher.base import Joint, TokenBatch
from sst_kernels.fisher.fisher import Fisher
from sst_kernels.fisher.hooks import Hooks, Tap
from sst_kernels.fisher.lora import LoraSite, whole_weight
from sst_kernels.fisher.passes import Pass
from sst_kernels.fisher.storage import read_tensors, write_tensors
from sst_kernels.fisher.taps import BranchTap, LayerTap, Signal
from sst_kernels.fisher.transfer import HostCopies, crosses
from sst_kernels.profiling import stage


class Accumulator(Hooks):
    """The open pass: `fisher` (mapping from block name to structure), `skipped` sample positions, `save(path)`.

    `progress` is what the last checkpoint was given, {} in a pass that starts from nothing. With the state on the host of a GPU the
    last batches may be on their way: `fisher` and `skipped` wait for them when asked, what was kept of an earlier answer does not.

    Example:
        >>> with sst.fisher_accumulate(model, "safety") as accumulator:
        ...     for batch in harm_batches:
        ...         _ = model(**batch).loss.backward()
        >>> accumulator.fisher.counts.sequences, accumulator.skipped
        (8, [])
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[LoraSite],
        fisher: Fisher,
        cores: Mapping[str, float | Tensor | None],
        *,
        branch: bool = False,
        **settings: Any,
    ):
        self._fisher, self._cores, self._branch = fisher, cores, branch
        self._factor = fisher.meta["space"] == "factor"
        super().__init__(model, sites, **settings)
        self._skipped: list[tuple[int, int]] = []
        self._copies = HostCopies()
        self._entering: int | None = None  # the batch whose rows are being added

    def _tap(self, site: LoraSite) -> Tap:
        core = self._cores[site.name]
        if isinstance(core, float) and core == 0 and LayerTap.fits(site) and not self._branch:
            return LayerTap(self, site, None if self._factor else whole_weight(site.lora_a), factor=self._factor)
        return BranchTap(self, site, core, factor=self._factor)

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

    def _settle(self) -> None:
        self._drain()
        self._read_flags()

    def _reduce(self) -> None:
        self._fisher.all_reduce(self._group)

    def save(self, path: str | os.PathLike) -> None:
        """Write the Fisher to a safetensors file (see `Fisher.save`)."""
        self.fisher.save(path)

    def save_checkpoint(self, path: str | os.PathLike, progress: Mapping[str, Any] | None = None) -> None:
        """Write everything that `fisher_accumulate(..., resume=path)` needs to go on, atomically.

        Call it between batches. `progress` (JSON-able) comes back as `.progress`: which batch is next, for instance. A resumed
        pass gives the same bits as an uninterrupted one when its remaining batches, and their label draws, are the same.
        Raises FloatingPointError for non-finite gradients not yet reported, RuntimeError inside a batch, and StorageError.
        """
        self._settle()
        self._between_batches()
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

    def _take(self, current: Pass, site: LoraSite, signal: Signal) -> None:
        e, right = current.flat(site, signal.e), current.flat(site, signal.right)
        if self._fisher.joint is not None:
            current.done[site.name] = (e, right)
            return
        current.done[site.name] = e
        sides = {site.name: (e, right)}
        if signal.left is not None and signal.h is not None:
            sides = {
                f"{site.name}.lora_A": (e, right),
                f"{site.name}.lora_B": (current.flat(site, signal.left), current.flat(site, signal.h)),
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
                holder.update(replace(batch, later=current.later))

    @stage("fisher")
    def _finish(self, current: Pass) -> None:
        joint = self._fisher.joint
        if joint is None:
            current.later.settle()
            tokens = torch.cat([e.to(self.sites[0].device) for e in current.done.values()], 1).sum(
                1, dtype=torch.float32
            )
            self._unread.append((current.index, ~current.samples_all(tokens.isfinite())))
            self._close(current)
            self._fisher.note(current.source, current.layout.samples, current.groups)
            return
        rows = current.core_rows(self.sites)
        self._close(current)
        if crosses(rows.device, joint.device):
            self._copies.send([rows], partial(self._add, joint, current))
        else:
            self._add(joint, current, rows.to(joint.device))

    def _add(self, joint: Joint, current: Pass, rows: Tensor) -> None:
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
        self._entering = current.index
        joint.append(rows, counts)
        self._entering = None
        self._fisher.note(current.source, n, groups)
