"""`Fisher`: the statistics of one pass over all blocks of an adapter, with everything needed to use, merge and reload them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sst_kernels.fisher.base import Block, Counts, Structure
from sst_kernels.fisher.structures import STRUCTURES, make_structure

SCHEMA = 1
# Two Fishers add up, or stand in one pencil, only when these agree.
IDENTITY = ("space", "fingerprint", "sample")


class Fisher(Mapping[str, Structure]):
    """Mapping from block name to structure (core space: the PEFT module name; factor space: `<module>.lora_A|lora_B`).

    blocks: name, module and shape of each block, in the model's order.
    joint: the one structure over the concatenated coordinates of all blocks where cross-module statistics are kept (structures
        "full", "lowrank", "diagonal" in core space), else None; `fisher[name]` is then a view of its columns.
    metric: per module (c²BᵀB, AAᵀ), [r, r] float64: the Frobenius metric of ΔW in core coordinates.
    groups: one integer per sample, in order; samples of one group (label draws of one prompt) belong together.
    meta: space, adapter, fingerprint of its weights, point, structure, scope, sample, count, labels.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        structures: dict[str, Structure],
        joint: Structure | None,
        metric: Mapping[str, tuple[Tensor, Tensor]],
        meta: dict[str, Any],
        groups: list[int] | None = None,
    ):
        self.blocks = {b.name: b for b in blocks}
        self.joint = joint
        self.metric = dict(metric)
        self.meta = meta
        self.groups = groups if groups is not None else []
        self._structures = structures
        sizes = [b.size for b in blocks]
        self._offsets = {b.name: sum(sizes[:i]) for i, b in enumerate(blocks)}

    @classmethod
    def empty(
        cls,
        blocks: Sequence[Block],
        structure: str,
        *,
        devices: Mapping[str, torch.device],
        metric: Mapping[str, tuple[Tensor, Tensor]],
        scope: str,
        sample: str,
        count: str,
        options: Mapping[str, Any],
        meta: Mapping[str, Any],
    ) -> Fisher:
        """A Fisher of `blocks` that holds nothing yet; each structure lives on the device of its module."""
        if scope not in ("global", "module"):
            raise ValueError(f'scope: expected "global" or "module", got {scope!r}')
        if structure not in STRUCTURES:
            raise ValueError(f"structure: expected one of {sorted(STRUCTURES)}, got {structure!r}")
        options = dict(options)
        joined = (
            scope == "global"
            and meta["space"] == "core"
            and sample == "sequence"
            and getattr(STRUCTURES[structure], "block", None) is not None
            and options.get("rows") != "fold"
        )
        if structure == "full" and scope == "module":
            options.setdefault("rows", "fold")
        common = {"sample": sample, "count": count, **options}
        joint, structures = None, {}
        if joined:
            total = sum(b.size for b in blocks)
            joint = make_structure(structure, (total, 1), device=next(iter(devices.values())), **common)
        else:
            structures = {
                b.name: make_structure(structure, b.shape, device=devices[b.module], **_for(b, common)) for b in blocks
            }
        about = {**meta, "structure": structure, "scope": scope, "sample": sample, "count": count, "labels": None}
        return cls(blocks, structures, joint, metric, about)

    def __getitem__(self, name: str) -> Structure:
        if name not in self.blocks:
            raise KeyError(
                f"{name!r} is no block of this Fisher; it has {len(self.blocks)}, such as {next(iter(self.blocks))!r}"
            )
        if self.joint is not None:
            return self.joint.block(self._offsets[name], self.blocks[name].shape)
        return self._structures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def counts(self) -> Counts:
        """Sequences, tokens and labels accumulated."""
        return self.joint.counts if self.joint is not None else next(iter(self._structures.values())).counts

    @property
    def nbytes(self) -> int:
        """Bytes of state over all blocks."""
        return sum(s.nbytes for s in self._holders().values())

    def rows(self) -> Tensor:
        """The aligned per-sample gradients of all blocks side by side, [N, Σ p·q] float32.

        ValueError when the structure does not keep them.
        """
        holders = self._holders().values()
        if self.meta["structure"] != "full" or any(getattr(s, "folded", False) for s in holders):
            raise ValueError(
                f"this Fisher (structure={self.meta['structure']!r}, scope={self.meta['scope']!r}) does not keep per-sample rows: "
                'accumulate with structure="full", scope="global"'
            )
        device = next(iter(holders)).device
        return torch.cat([s.rows.to(device) for s in holders], 1) if len(holders) > 1 else next(iter(holders)).rows

    def note(self, labels: str, samples: int, groups: Sequence[int] | None) -> None:
        """Record where the labels of the samples just added came from, and their groups (each its own by default)."""
        if self.meta["labels"] not in (None, labels):
            raise ValueError(f"labels from {self.meta['labels']!r} and from {labels!r} must not be mixed in one Fisher")
        self.meta["labels"] = labels
        start = max(self.groups, default=-1) + 1
        self.groups += range(start, start + samples) if groups is None else [int(g) for g in groups]

    def check_same(self, other: Fisher, *, what: str, keys: Sequence[str] = IDENTITY) -> None:
        """ValueError unless both describe the same coordinates; `what` names the attempted operation."""
        for key in keys:
            if self.meta.get(key) != other.meta.get(key):
                raise ValueError(f"cannot {what}: {key} differs ({self.meta.get(key)!r} and {other.meta.get(key)!r})")
        if list(self.blocks.values()) != list(other.blocks.values()):
            raise ValueError(f"cannot {what}: the blocks differ ({len(self.blocks)} and {len(other.blocks)})")

    def merge(self, other: Fisher) -> None:
        """Add another pass over other data. ValueError when adapter, space, point, labels or options differ."""
        self.check_same(other, what="merge Fishers", keys=(*IDENTITY, "point", "labels", "structure", "scope"))
        start = max(self.groups, default=-1) + 1
        for mine, theirs in zip(self._holders().values(), other._holders().values()):
            mine.merge(theirs)
        self.groups += [start + g for g in other.groups]

    def all_reduce(self, group: Any = None) -> None:
        """Combine over the ranks of a torch.distributed group: afterwards every rank holds the total."""
        import torch.distributed as dist

        for structure in self._holders().values():
            structure.all_reduce(group)
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, self.groups, group=group)
        self.groups, start = [], 0
        for groups in gathered:
            self.groups += [start + g for g in groups]
            start = max(self.groups, default=-1) + 1

    def save(self, path: str | os.PathLike) -> None:
        """Write all state to one safetensors file, atomically (write, fsync, rename)."""
        holders = self._holders()
        tensors = {f"state/{name}/{key}": t for name, s in holders.items() for key, t in s.state_dict().items()}
        tensors |= {
            f"metric/{name}/{side}": t for name, pair in self.metric.items() for side, t in zip(("left", "right"), pair)
        }
        header = {
            "schema": SCHEMA,
            "meta": self.meta,
            "groups": self.groups,
            "blocks": [asdict(b) for b in self.blocks.values()],
            "joint": self.joint is not None,
            "holders": {name: {"options": s.options(), "counts": asdict(s.counts)} for name, s in holders.items()},
        }
        path = Path(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as handle:
            temporary = Path(handle.name)
        try:
            save_file(
                {k: t.detach().cpu().contiguous() for k, t in tensors.items()},
                temporary,
                {"sst_kernels": json.dumps(header)},
            )
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> Fisher:
        """Read what `save` wrote. ValueError when the file is no Fisher, is damaged, or has another schema."""
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = json.loads((file.metadata() or {}).get("sst_kernels", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}): accumulate and save the Fisher again"
            ) from error
        if header is None or header.get("schema") != SCHEMA:
            found = None if header is None else header.get("schema")
            raise ValueError(
                f"{path} is no Fisher of schema {SCHEMA} (found {found}): accumulate and save it with this version"
            )
        blocks = [Block(b["name"], b["module"], tuple(b["shape"])) for b in header["blocks"]]
        shapes = {b.name: b.shape for b in blocks} | {"joint": (sum(b.size for b in blocks), 1)}
        holders = {}
        for name, saved in header["holders"].items():
            structure = make_structure(header["meta"]["structure"], shapes[name], device=device, **saved["options"])
            prefix = f"state/{name}/"
            structure.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
            structure.counts = Counts(**saved["counts"])
            holders[name] = structure
        joint = holders.pop("joint") if header["joint"] else None
        modules = dict.fromkeys(b.module for b in blocks)
        metric = {m: (tensors[f"metric/{m}/left"].cpu(), tensors[f"metric/{m}/right"].cpu()) for m in modules}
        return cls(blocks, holders, joint, metric, header["meta"], header["groups"])

    def _holders(self) -> dict[str, Structure]:
        return {"joint": self.joint} if self.joint is not None else self._structures

    def __repr__(self) -> str:
        c, m = self.counts, self.meta
        return (
            f"Fisher({len(self)} blocks, {sum(b.size for b in self.blocks.values())} coordinates, space={m['space']}, "
            f"structure={m['structure']}, scope={m['scope']}, point={m['point']}, labels={m['labels']}, "
            f"sequences={c.sequences}, labels={c.labels}, bytes={self.nbytes})"
        )


def _for(block: Block, options: dict[str, Any]) -> dict[str, Any]:
    """Options of one block: those given per block name (a mapping such as `basis=other_fisher`) are looked up."""
    return {k: v[block.name] if isinstance(v, Mapping) else v for k, v in options.items()}
