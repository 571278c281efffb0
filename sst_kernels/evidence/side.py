"""What one side's data tell: gradients of every sample with respect to what the patch reads, and the moments of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sst_kernels.distributed import gather_objects
from sst_kernels.fisher.base import Block, Counts
from sst_kernels.fisher.fisher import IDENTITY, Fisher
from sst_kernels.fisher.structures import Full
from sst_kernels.inputs.moments import MomentSums


class Side:
    """One side's share of an `Evidence`.

    rows: per named loss a Fisher in space "reads": blocks [r, m], per-sample gradients Σ_t e_t y_tᵀ, y = x or Q x, one row a sample.
    moments: Σ y yᵀ per module. skipped: (batch, sample) left out by nonfinite="skip".

    Example:
        >>> evidence.gain.counts.sequences, list(evidence.gain.rows)
        (8, ['loss'])
        >>> evidence.gain.rows["loss"].rows().shape  # a row a sample, all modules side by side
        torch.Size([8, 1440])
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        moments: MomentSums,
        meta: Mapping[str, Any],
        *,
        metric: Mapping[str, tuple[Tensor, Tensor]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        self.blocks, self.moments, self.meta, self.metric = list(blocks), moments, dict(meta), dict(metric)
        self.dtype, self.device = dtype, device
        self.rows: dict[str, Fisher] = {}
        self.skipped: list[tuple[int, int]] = []
        self.columns: dict[str, slice] = {}
        self.width = 0
        for block in self.blocks:
            self.columns[block.name] = slice(self.width, self.width + block.size)
            self.width += block.size
        self._expected = 0

    @property
    def counts(self) -> Counts:
        """Sequences (a draw each), tokens and labels accumulated."""
        return next(iter(self.rows.values())).counts if self.rows else Counts()

    @property
    def next_group(self) -> int:
        """The first group number that is free."""
        return max((g for fisher in self.rows.values() for g in fisher.groups), default=-1) + 1

    @property
    def nbytes(self) -> int:
        return self.moments.nbytes + sum(fisher.nbytes for fisher in self.rows.values())

    def empty(self, name: str | None = None) -> Side:
        """One of the same kind that holds nothing; as another side where it is named."""
        moments = MomentSums(self.moments.widths, self.moments.rank, self.moments.seed)
        meta = self.meta if name is None else {**self.meta, "side": name}
        return Side(self.blocks, moments, meta, metric=self.metric, dtype=self.dtype, device=self.device)

    def reserve(self, samples: int) -> None:
        """Make room for so many rows of every loss."""
        self._expected = samples

    def loss(self, name: str, device: torch.device | None = None) -> Fisher:
        """The rows of a named loss; a new one holds none."""
        if name not in self.rows:
            joint = Full(
                (self.width, 1), device=self.device or device or "cpu", dtype=str(self.dtype).removeprefix("torch.")
            )
            joint.reserve(self._expected)
            meta = {**self.meta, "loss": name, "labels": None, "groups": None}
            self.rows[name] = Fisher(self.blocks, {}, joint, self.metric, meta)
        return self.rows[name]

    def add(self, name: str, rows: Tensor, counts: Counts, source: str, groups: Sequence[int] | None) -> None:
        """Add rows [N, width] of a loss."""
        fisher = self.loss(name, rows.device)
        assert isinstance(fisher.joint, Full)
        fisher.joint.append(rows, counts)
        fisher.note(source, len(rows), groups)

    def check_same(self, other: Side) -> None:
        """ValueError when they differ in anything but data."""
        if self.blocks != other.blocks or self.dtype != other.dtype:
            raise ValueError("the two were read in other coordinates, or are kept in another dtype")
        self.moments.check_same(other.moments)
        if self.rows and other.rows:
            check_losses(self.rows, other.rows)
            for name, fisher in self.rows.items():
                fisher.check_same(other.rows[name], what="add up gradients", keys=(*IDENTITY, "labels", "point"))

    def merge(self, other: Side) -> None:
        """Add another pass over other data. ValueError, before anything is added, as of `check_same`."""
        self.check_same(other)
        self.moments.merge(other.moments)
        for name, fisher in other.rows.items():
            assert fisher.joint is not None
            own = self.loss(name, fisher.joint.device)
            own.meta |= {key: fisher.meta[key] for key in ("labels", "groups")}
            own.merge(fisher)
        self.skipped += other.skipped

    def all_reduce(self, devices: Mapping[str, torch.device], group: Any) -> None:
        """The total of all ranks, on each, rows in rank order; ranks without data learn the names of the losses."""
        found = gather_objects((list(self.rows), self.skipped), group)
        named = [names for names, _ in found if names]
        for names in named:
            check_losses(named[0], names)
        self.skipped = [position for _, skipped in found for position in skipped]
        home = next(iter(devices.values()))
        self.rows = {name: self.loss(name, home) for name in (named[0] if named else [])}
        for fisher in self.rows.values():
            fisher.all_reduce(group)
        self.moments.all_reduce(group, devices)

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All state as a JSON-able header and tensors by name."""
        about, tensors = self.moments.pack()
        tensors = {f"moments/{name}": tensor for name, tensor in tensors.items()}
        losses = {}
        for name, fisher in self.rows.items():
            losses[name], kept = fisher.pack()
            tensors |= {f"loss/{name}/{key}": tensor for key, tensor in kept.items() if not key.startswith("metric/")}
        header = {
            "meta": self.meta,
            "moments": about,
            "losses": losses,
            "skipped": self.skipped,
            "dtype": str(self.dtype),
        }
        return header, tensors

    def unpack(
        self,
        header: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        devices: Mapping[str, torch.device] | None = None,
    ) -> None:
        """Replace the state by a packed one. ValueError, naming what differs, when it is of another pass."""
        differing = [key for key, value in self.meta.items() if header["meta"].get(key) != value]
        differing += ["dtype"] * (header["dtype"] != str(self.dtype))
        of = ("widths", "rank", "seed")
        differing += [k for k in of if header["moments"][k] != getattr(self.moments, k)]
        if differing:
            raise ValueError(
                f"the saved state is of another pass: {', '.join(differing)} differ; go on with the settings of that pass, or start anew"
            )
        prefix = "moments/"
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        self.moments = MomentSums.unpack(header["moments"], own, devices)
        self.rows = {}
        home = None if devices is None else next(iter(devices.values()))
        for name, about in header["losses"].items():
            prefix = f"loss/{name}/"
            self.loss(name, home).unpack(
                about, {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            )
        self.skipped = [(batch, sample) for batch, sample in header["skipped"]]


def check_losses(mine: Iterable[str], theirs: Iterable[str]) -> None:
    """ValueError unless both name the same losses: rows of one sample stand at one place in all of them."""
    if set(mine) != set(theirs):
        raise ValueError(
            f"the losses differ: {sorted(mine)} and {sorted(theirs)}; every batch of a side brings the same ones"
        )
