"""`Fisher`: the statistics of one pass over all blocks of an adapter, with everything needed to use, merge and reload them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sst_kernels.distributed import gather_objects, reduce_over_ranks
from sst_kernels.fisher.base import Block, Counts, Joint, Structure
from sst_kernels.fisher.storage import read_tensors, write_tensors
from sst_kernels.fisher.structures import STRUCTURES, Full, make_structure

# Two Fishers add up, or stand in one pencil, only when these agree.
IDENTITY = ("space", "fingerprint", "sample")


class Fisher(Mapping[str, Structure]):
    """Mapping from block name to structure (core space: the PEFT module name; factor space: `<module>.lora_A|lora_B`).

    blocks: name, module and shape of each block, in the model's order.
    joint: the one structure over the concatenated coordinates of all blocks where cross-module statistics are kept (structures
        "full", "lowrank", "diagonal" in core space), else None; `fisher[name]` is then a view of its columns.
    metric: per module (c²BᵀB, AAᵀ), [r, r] float64: the Frobenius metric of ΔW in core coordinates.
    groups: one integer per sample, in order; samples of one group (label draws of one prompt) belong together.
    meta: space, adapter, fingerprint of its weights, point, structure, scope, sample, count, labels, groups ("given" or "own").

    Example:
        >>> gain.rows().shape  # samples, coordinates of all modules
        torch.Size([8, 126])
        >>> block = gain["model.layers.0.self_attn.q_proj"]
        >>> block.dense().shape
        torch.Size([9, 9])
        >>> gain.save("gain.safetensors")
        >>> sst.Fisher.load("gain.safetensors").counts == gain.counts
        True
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        structures: dict[str, Structure],
        joint: Joint | None,
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
        kind, across, options = arrangement(structure, dict(options), space=meta["space"], scope=scope, sample=sample)
        common = {"sample": sample, "count": count, **options}
        joint: Joint | None = None
        structures: dict[str, Structure] = {}
        if across:
            assert issubclass(kind, Joint)
            total = sum(b.size for b in blocks)
            joint = kind((total, 1), device=next(iter(devices.values())), **common)
        else:
            structures = {
                b.name: make_structure(structure, b.shape, device=devices[b.module], **_for(b, common)) for b in blocks
            }
        about = {
            **meta,
            "structure": structure,
            "scope": scope,
            "sample": sample,
            "count": count,
            "labels": None,
            "groups": None,
        }
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
        if not all(s.keeps_rows for s in self._holders().values()):
            raise ValueError(
                f"this Fisher (structure={self.meta['structure']!r}, scope={self.meta['scope']!r}) does not keep per-sample rows: "
                'accumulate with structure="full", scope="global"'
            )
        parts = [s.rows for s in self._holders().values() if isinstance(s, Full)]
        return torch.cat([rows.to(parts[0].device) for rows in parts], 1) if len(parts) > 1 else parts[0]

    @property
    def keeps_rows(self) -> bool:
        """Whether it tells all samples apart, as cross-fitting needs."""
        return self.meta["sample"] == "sequence" and all(s.keeps_rows for s in self._holders().values())

    def joint_rows(self) -> Tensor:
        """Rows R [N, Σ p·q] with RᵀR / N the Fisher per sequence: the samples', or those of a sketch of all modules.

        ValueError when the structure keeps no statistics across modules.
        """
        if self.keeps_rows:
            return self.rows()
        if self.joint is None or not self.joint.spans_modules:
            raise ValueError(
                f"scope='global' needs cross-module statistics, which structure {self.meta['structure']!r} (scope={self.meta['scope']!r}) "
                "does not keep: accumulate with structure='full' or 'lowrank', or use scope='module'"
            )
        rows = self.joint.operator().rows
        return rows * (getattr(self.counts, self.meta["count"]) / self.counts.sequences * len(rows)) ** 0.5

    def note(self, labels: str, samples: int, groups: Sequence[int] | None) -> None:
        """Record where the labels of the samples just added came from, and their groups (each its own by default)."""
        source = {"labels": labels, "groups": "own" if groups is None else "given"}
        for key, value in source.items():
            if self.meta.get(key) not in (None, value):
                raise ValueError(f"{key} from {self.meta[key]!r} and from {value!r} must not be mixed in one Fisher")
        self.meta |= source
        start = len(self.groups)
        self.groups += range(start, start + samples) if groups is None else [int(g) for g in groups]

    def check_same(self, other: Fisher, *, what: str, keys: Sequence[str] = IDENTITY) -> None:
        """ValueError unless both describe the same coordinates; `what` names the attempted operation."""
        for key in keys:
            if self.meta.get(key) != other.meta.get(key):
                raise ValueError(f"cannot {what}: {key} differs ({self.meta.get(key)!r} and {other.meta.get(key)!r})")
        if list(self.blocks.values()) != list(other.blocks.values()):
            raise ValueError(f"cannot {what}: the blocks differ ({len(self.blocks)} and {len(other.blocks)})")

    def merge(self, other: Fisher, *, mix_points: bool = False) -> None:
        """Add another pass over other data. ValueError when adapter, space, point, labels or options differ.

        `mix_points=True` adds a pass over the *same* data, in the same order, at another evaluation point: the result is the mean over
        the points (`meta["point"]` names them all), and a sample stays in one group whatever the point.
        """
        keys = (*IDENTITY, "labels", "structure", "scope")
        self.check_same(other, what="merge Fishers", keys=keys if mix_points else (*keys, "point"))
        if mix_points and self.groups[-len(other.groups) :] != other.groups:
            raise ValueError(
                "mix_points=True adds another point of the same samples, but the groups of the two passes differ"
            )
        start = 0 if mix_points else max(self.groups, default=-1) + 1
        for mine, theirs in zip(self._holders().values(), other._holders().values()):
            mine.merge(theirs)
        self.groups += [start + g for g in other.groups]
        if mix_points:
            self.meta["point"] = f"{self.meta['point']}+{other.meta['point']}"
            self.meta["point_given"] = self.meta["point_given"] and other.meta["point_given"]

    def all_reduce(self, group: Any = None) -> None:
        """Combine over the ranks of a torch.distributed group: afterwards every rank holds the total.

        Rows stand in rank order; a rank may have seen nothing. Group numbers that were given to `sequence_nll` or
        `declared_loss` name the same group on every rank; others are numbered on. ValueError, on every rank, when the ranks
        do not accumulate the same thing.
        """
        about = (self.meta, list(self.blocks.values()), [s.options() for s in self._holders().values()], self.groups)
        shares = gather_objects(about, group)
        for rank, (meta, blocks, options, _) in enumerate(shares):
            differing = [k for k in self.meta if k not in ("labels", "groups") and meta.get(k) != self.meta[k]]
            if differing or blocks != about[1] or options != about[2]:
                raise ValueError(
                    f"cannot reduce: rank {rank} accumulates with other {differing or ['blocks or options']}"
                )
        for key in ("labels", "groups"):
            found = {meta.get(key) for meta, *_ in shares} - {None}
            if len(found) > 1:
                raise ValueError(f"cannot reduce: the ranks hold {key} from {sorted(found)}")
            self.meta[key] = found.pop() if found else None
        holders = self._holders().values()
        reduce_over_ranks([r for s in holders for r in (s.reduction(), s.count_reduction())], group)
        self.groups = []
        for *_, groups in shares:
            start = 0 if self.meta["groups"] == "given" else len(self.groups)
            self.groups += [start + g for g in groups]

    def save(self, path: str | os.PathLike) -> None:
        """Write all state to one safetensors file with a checksum, atomically. Raises `storage.StorageError`."""
        header, tensors = self.pack()
        write_tensors(path, tensors, {"kind": "fisher", **header})

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> Fisher:
        """Read what `save` wrote. ValueError when the file is no Fisher, is damaged, or has another schema."""
        header, tensors = read_tensors(path, device)
        if header.get("kind") != "fisher":
            raise ValueError(
                f"{path} holds a {header.get('kind')!r}, expected a Fisher: a checkpoint belongs to resume="
            )
        try:
            blocks = [Block(b["name"], b["module"], (b["shape"][0], b["shape"][1])) for b in header["blocks"]]
            shapes = {b.name: b.shape for b in blocks} | {"joint": (sum(b.size for b in blocks), 1)}
            kind = header["meta"]["structure"]
            holders = {
                name: make_structure(kind, shapes[name], device=device, **saved["options"])
                for name, saved in header["holders"].items()
            }
            if holders.keys() != ({"joint"} if header["joint"] else {b.name for b in blocks}):
                raise KeyError("holders")
            joint = holders.pop("joint") if header["joint"] else None
            if not isinstance(joint, Joint | None):
                raise TypeError(f"{kind} is kept per block, not jointly")
            metric = {
                m: (tensors[f"metric/{m}/left"].cpu(), tensors[f"metric/{m}/right"].cpu())
                for m in dict.fromkeys(b.module for b in blocks)
            }
            fisher = cls(blocks, holders, joint, metric, dict(header["meta"]))
            fisher.unpack(header, tensors)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{path}: its header does not describe a Fisher ({error!r}): accumulate and save it again"
            ) from error
        return fisher

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All state as a JSON-able header and tensors by name."""
        holders = self._holders()
        tensors = {f"state/{name}/{key}": t for name, s in holders.items() for key, t in s.state_dict().items()}
        tensors |= {
            f"metric/{name}/{side}": t for name, pair in self.metric.items() for side, t in zip(("left", "right"), pair)
        }
        return self._header(), tensors

    def unpack(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by a packed one, on this Fisher's devices. ValueError, naming what differs, when it is another's."""
        mine = self._header()
        loose = {"labels", "groups", "point_given"}
        differing = [k for k in mine["meta"] if k not in loose and mine["meta"][k] != header["meta"].get(k)]
        for key in ("blocks", "joint"):
            differing += [key] * (mine[key] != header[key])
        saved = header["holders"]
        options = {name: held["options"] for name, held in mine["holders"].items()}
        differing += ["options"] * (options != {name: held["options"] for name, held in saved.items()})
        if differing:
            raise ValueError(
                f"the saved state is of another pass: {', '.join(differing)} differ; go on with the settings of that pass, or start anew"
            )
        for name, structure in self._holders().items():
            prefix = f"state/{name}/"
            state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            structure.load_state_dict(state)
            if _shapes(structure.state_dict()) != _shapes(state):
                raise ValueError(
                    f"the saved state of {name!r} has other tensors than {structure!r}: it is damaged, save it anew"
                )
            structure.counts = Counts(**saved[name]["counts"])
        self.groups = list(header["groups"])
        self.meta |= {key: header["meta"].get(key) for key in ("labels", "groups")}

    def _header(self) -> dict[str, Any]:
        return {
            "meta": self.meta,
            "groups": self.groups,
            "blocks": [asdict(b) | {"shape": list(b.shape)} for b in self.blocks.values()],
            "joint": self.joint is not None,
            "holders": {
                name: {"options": s.options(), "counts": asdict(s.counts)} for name, s in self._holders().items()
            },
        }

    def _holders(self) -> dict[str, Structure]:
        return {"joint": self.joint} if self.joint is not None else self._structures

    def __repr__(self) -> str:
        c, m = self.counts, self.meta
        return (
            f"Fisher({len(self)} blocks, {sum(b.size for b in self.blocks.values())} coordinates, space={m['space']}, "
            f"structure={m['structure']}, scope={m['scope']}, point={m['point']}, labels={m['labels']}, "
            f"sequences={c.sequences}, labels={c.labels}, bytes={self.nbytes})"
        )


def arrangement(
    structure: str, options: dict[str, Any], *, space: str, scope: str, sample: str
) -> tuple[type[Structure], bool, dict[str, Any]]:
    """The class of a structure, whether one of it holds all blocks side by side, and its options. ValueError for an unknown name."""
    if structure not in STRUCTURES:
        raise ValueError(f"structure: expected one of {sorted(STRUCTURES)}, got {structure!r}")
    kind = STRUCTURES[structure]
    if scope == "module":
        return kind, False, kind.per_module(**options)
    joint = space == "core" and sample == "sequence" and issubclass(kind, Joint) and kind.joins(**options)
    return kind, joint, options


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}


def _for(block: Block, options: dict[str, Any]) -> dict[str, Any]:
    """Options of one block: those given per block name (a mapping such as `basis=other_fisher`) are looked up."""
    return {k: v[block.name] if isinstance(v, Mapping) else v for k, v in options.items()}
