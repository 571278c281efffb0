"""`Reading`: the open pass over one side's data. One forward pass a batch gives the moments of what modules read, and, with as many
backward passes as there are losses or label draws, the gradients of every sample with respect to what the patch reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sst_kernels.evidence.side import Side, check_losses
from sst_kernels.fisher.base import whole
from sst_kernels.fisher.hooks import Hooks
from sst_kernels.fisher.lora import LoraSite
from sst_kernels.fisher.loss import LabelSource, declared_loss, draw_labels, label_logits, label_origin, nll
from sst_kernels.fisher.passes import Pass
from sst_kernels.fisher.storage import read_tensors, write_tensors
from sst_kernels.fisher.taps import LayerTap, Signal
from sst_kernels.fisher.transfer import HostCopies, crosses
from sst_kernels.inputs.filter import Basis
from sst_kernels.ops import factor_rows
from sst_kernels.profiling import stage

_COUNTED = ""  # beside the names of modules: the batch's tokens are counted
DEFAULT = "loss"  # the name of a loss that was given none


class Reading(Hooks):
    """The open pass of `Evidence.accumulate`: run `backward(batch)` for every batch, or a loop of your own inside it.

    The evidence takes in what was read when the context is left without an error, and is as it was before otherwise. `progress` is
    what the last checkpoint was given, {} in a pass that starts from nothing.

    Example:
        >>> evidence = sst.Evidence.of(model, adapter="safety")
        >>> with evidence.accumulate("cost") as reading:
        ...     for batch in benign_batches:
        ...         reading.backward(batch, labels="mc", draws=2)
        >>> evidence.cost.counts.sequences  # two draws of each of 12 prompts
        24
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[LoraSite],
        side: Side,
        basis: Basis | None,
        complete: Callable[[Side], None],
        **settings: Any,
    ):
        self._side, self._basis, self._take_in = side, basis, complete
        super().__init__(model, sites, **settings)
        self._schedule: list[str] = [DEFAULT]
        self._copies = HostCopies()
        self._known: list[tuple[int, set[str]]] = []  # samples to come whose inputs these modules' moments hold already
        self._home = sites[0].device
        self._losses: list[str] = []  # that every batch brings
        self._next_group = 0 if self._group is None else dist.get_rank(self._group) << 32
        self._entering: int | None = None  # the batch whose rows are being added
        self._left = False

    def __enter__(self) -> Self:
        if self._left:
            raise RuntimeError("this pass is over: call Evidence.accumulate again for another")
        return super().__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left = True
        super().__exit__(kind, error, trace)
        if kind is None:
            self._take_in(self._side)

    def _tap(self, site: LoraSite) -> LayerTap:
        return LayerTap(self, site, None if self._basis is None else self._basis[site.name], exact=True)

    def backward(
        self,
        batch: Mapping[str, Any],
        *,
        labels: LabelSource = "empirical",
        draws: int = 1,
        weights: Tensor | Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        groups: Sequence[int] | None = None,
    ) -> None:
        """Forward and backward of one batch: `sequence_nll` with several losses, or several label draws, after one forward pass.

        Args:
            batch: keyword arguments of the model with `labels` [N, T] (-100 where there is no loss).
            labels: "empirical" takes them as they are (empirical Fisher); "mc" draws each anew from the model's own prediction at its
                position (MC Fisher).
            draws: label draws, each a row of its own for every sample (labels="mc").
            weights: factors [N, T] of each label's term, or several named losses: rows are kept for each of them (labels="empirical").
            groups: one integer a sample; samples of one group are never split by cross-fitting. Draws of a sample share a group anyway.

        Raises what `sequence_nll` raises, and ValueError when the named losses are not those of the batches before.
        """
        draws = whole("draws", draws)
        origin = label_origin(labels)
        if origin == "model" and weights is not None:
            raise ValueError(
                'weights go with labels="empirical": the Fisher of drawn labels is that of the model, without weights'
            )
        if origin == "data" and draws != 1:
            raise ValueError(f'draws={draws} goes with labels="mc": the data have one answer')
        named = dict(weights) if isinstance(weights, Mapping) else {DEFAULT: weights}
        if not named or not all(isinstance(name, str) for name in named):
            raise ValueError(
                f"weights: expected factors, or factors by the name of a loss, got the names {list(named)}"
            )
        self._schedule = list(named) if origin == "data" else [DEFAULT] * draws
        free = self._next_group
        numbered = draws > 1 and groups is None
        source = origin if weights is None else "weighted data"
        places: Any = batch.get("labels")  # missing ones are refused with the forward pass
        try:
            with declared_loss(places, source=source, groups=groups):
                logits, answers, _ = label_logits(self.model, batch)
                current = self._waiting[-1]
                if numbered:
                    current.groups = range(free, free + current.layout.samples)
                drawn = draw_labels(logits, draws, generator) if origin == "model" else None
            last = len(self._schedule) - 1
            for i, name in enumerate(self._schedule):
                given = None if drawn is not None else named[name]
                loss = nll(logits, answers if drawn is None else drawn[i], batch["labels"], given)
                current.watch(loss)
                loss.backward(retain_graph=i < last)
            if numbered:
                self._next_group = free + current.layout.samples
        finally:
            self._schedule = [DEFAULT]

    def _look(self, current: Pass, site: LoraSite, kept: Tensor) -> None:
        if not current.seen - {site.name}:
            self._begin(current)
        with torch.no_grad():
            flat = current.flat(site, kept)
            self._side.moments.add(site.name, kept, flat, current.spans(flat.device), known=current.known)

    def _begin(self, current: Pass) -> None:
        """The first module of a forward pass: whether earlier attempts have left moments of these samples behind."""
        current.schedule, current.known = list(self._schedule), set()
        self._losses = self._losses or list(dict.fromkeys(self._schedule))
        check_losses(self._losses, self._schedule)
        if self._known:
            count, known = self._known[0]
            if current.layout.samples > count:
                raise RuntimeError(
                    f"after abandon() the same {count} samples are run again, in pieces, before others: got {current.layout.samples}"
                )
            current.known = set(known)
            self._known[0] = (count - current.layout.samples, known)
            if self._known[0][0] == 0:
                del self._known[0]
        if _COUNTED not in current.known:
            self._side.moments.tokens += current.layout.tokens
            current.known.add(_COUNTED)

    def _take(self, current: Pass, site: LoraSite, signal: Signal) -> None:
        if current.rows is None:
            current.rows = torch.empty(current.layout.samples, self._side.width, device=self._home)
        e, right = current.flat(site, signal.e), current.flat(site, signal.right)
        out = current.rows[:, self._side.columns[site.name]]
        where = e.device
        if where == self._home:
            factor_rows(e, right.to(e.dtype), current.spans(where), current.scale(where), out)
        else:
            own = torch.empty(out.shape, device=where)
            out.copy_(factor_rows(e, right.to(e.dtype), current.spans(where), current.scale(where), own))
        current.done[site.name] = None

    @stage("evidence")
    def _finish(self, current: Pass) -> None:
        assert current.rows is not None
        current.finished.append(current.rows)
        current.rows = None
        if len(current.finished) < len(current.schedule):
            current.again()
            return
        self._close(current)
        target = self._side.device or self._home
        if crosses(self._home, target):
            self._copies.send(current.finished, lambda *rows: self._add(current, rows))
        else:
            self._add(current, [rows.to(target) for rows in current.finished])

    def _add(self, current: Pass, parts: Sequence[Tensor]) -> None:
        """Add the rows of a batch, where the side keeps them."""
        finite = torch.stack([rows.isfinite().all(1) for rows in parts]).all(0)
        kept = None
        if self._nonfinite == "raise":
            self._unread.append((current.index, ~finite))
        elif not (kept := finite.cpu()).all():
            self._side.skipped += [(current.index, i) for i in (~kept).nonzero().flatten().tolist()]
        counts = current.counts if kept is None else current.counts_of(kept)
        groups = current.groups
        if groups is not None and kept is not None:
            groups = [g for g, keep in zip(groups, kept.tolist()) if keep]
        self._entering = current.index
        for name, rows in zip(current.schedule, parts):
            rows = rows if kept is None else rows[kept.to(rows.device)]
            self._side.add(name, rows, counts, current.source, groups)
        self._entering = None

    def abandon(self) -> None:
        """Forget the forward pass whose forward or backward failed (out of memory), so that its samples can be run again in pieces.

        They have to come next: what of them the moments hold already is remembered, and not added again. MemoryError when the rows
        of a batch may be held in part: go on from a checkpoint then.
        """
        if self._entering is not None:
            raise MemoryError(
                f"batch {self._entering} failed while its rows were added: go on from the last checkpoint, or start again, with "
                'state_device="cpu", dtype="bfloat16" or a basis'
            )
        for waiting in reversed(self._waiting):
            if waiting.seen:
                self._known.insert(0, (waiting.layout.samples, waiting.known))
        self._batches -= len(self._waiting)
        self._waiting.clear()
        self._forward = None

    def save_checkpoint(self, path: str | os.PathLike, progress: Mapping[str, Any] | None = None) -> None:
        """Write everything that `Evidence.accumulate(..., resume=path)` needs to go on, atomically; call it between batches.

        `progress` (JSON-able) comes back as `.progress`. A resumed pass gives the bits of an uninterrupted one when its remaining
        batches, and their label draws, are the same. Raises as `Accumulator.save_checkpoint` does.
        """
        self._settle()
        self._between_batches()
        header, tensors = self._side.pack()
        about = {"batches": self._resumed + self._batches, "progress": dict(progress or {})}
        write_tensors(path, tensors, {"kind": "evidence checkpoint", "side": header, "reading": about})

    def load_checkpoint(self, path: str | os.PathLike) -> None:
        """Take over the state of a checkpoint of the same pass (`resume=` does this).

        Raises FileNotFoundError, or ValueError when the file is damaged or belongs to another pass.
        """
        header, tensors = read_tensors(path)
        if header.get("kind") != "evidence checkpoint":
            raise ValueError(f"{path} holds a {header.get('kind')!r}, expected the checkpoint of an evidence pass")
        try:
            self._side.unpack(header["side"], tensors, {site.name: site.device for site in self.sites})
            self.progress, self._resumed = header["reading"]["progress"], header["reading"]["batches"]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path}: its header does not describe a pass ({error!r}): start anew") from error
        self._losses = list(self._side.rows)
        self._next_group = max(self._next_group, self._side.next_group)

    def _settle(self) -> None:
        with self._lock:
            self._copies.drain()
        self._read_flags()

    def _unanswered(self, count: int) -> None:
        raise RuntimeError(
            f"{count} forward passes were never followed by backward(), and the moments hold what was read in them: run what is not to "
            "count under torch.no_grad()"
        )

    def _between_batches(self) -> None:
        super()._between_batches()
        self._none_abandoned()

    def _none_abandoned(self) -> None:
        if missing := sum(count for count, _ in self._known):
            raise RuntimeError(
                f"{missing} samples were abandoned and not run again, and the moments hold some of what they read"
            )

    def _complete(self) -> None:
        super()._complete()
        self._none_abandoned()
        if self._group is None:
            self._side.moments.check_finite()

    def _reduce(self) -> None:
        self._side.all_reduce({site.name: site.device for site in self.sites}, self._group)
        self._side.moments.check_finite()
