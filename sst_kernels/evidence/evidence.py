"""`Evidence`: what one reading of two sides' data tells about a patch, kept, so that every decision about it follows without the model.

At the reference point (patch off) nothing that a patch does changes what the model computes. One forward pass a batch therefore
gives both the second moments of the inputs x of every patched module and, with its backward pass, the gradient of every sample n
with respect to A,

    G_n = Σ_t e_t x_tᵀ        [r, d_in],   e = c Bᵀ ∂L/∂y

which knows the gradients in core coordinates for *any* row space A' that is chosen afterwards: ∂L/∂S = G_n A'ᵀ [r, r].
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from sst_kernels.evidence.reading import Reading
from sst_kernels.evidence.side import Side
from sst_kernels.fisher.base import Block, Counts, whole
from sst_kernels.fisher.estimate import Estimate
from sst_kernels.fisher.fisher import Fisher
from sst_kernels.fisher.lora import LoraSite, digest_of, find_sites, fingerprint, unwrapped, whole_weight
from sst_kernels.fisher.memory import require
from sst_kernels.fisher.storage import read_tensors, write_tensors
from sst_kernels.fisher.structures import Full
from sst_kernels.inputs.filter import MUS, Basis, check_mu, filtered_in_basis, filtered_lora_A
from sst_kernels.inputs.moments import MomentSums, require_moments, width_of
from sst_kernels.profiling import stage
from sst_kernels.subspace import Metric, Scope, Subspace, subspace
from sst_kernels.subspace.lora import Lora

SideName = Literal["gain", "cost", "guard"]
SIDES: tuple[SideName, ...] = ("gain", "cost", "guard")
GUARD = 0.01  # trace of the guard's rows over that of the cost's, where there are some


class PencilOptions(TypedDict, total=False):
    """What `sst_kernels.subspace` takes beside the two Fishers."""

    scope: Scope
    metric: Metric
    damping: float
    folds: int
    group: Any


@dataclass(frozen=True)
class Weights:
    """The adapter that was read: per module A [r, d_in], B [d_out, r] (float32, CPU) and the scaling c.

    Example:
        >>> a = evidence.weights.a["model.layers.0.self_attn.q_proj"]
        >>> a.shape, evidence.weights.scaling["model.layers.0.self_attn.q_proj"]
        (torch.Size([3, 32]), 2.0)
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    scaling: dict[str, float]

    @classmethod
    def of(cls, sites: Sequence[LoraSite]) -> Weights:
        a, b = (
            {s.name: whole_weight(w(s)).to("cpu", torch.float32, copy=True) for s in sites} for w in (_lora_a, _lora_b)
        )
        return cls(a, b, {s.name: s.scaling for s in sites})

    def metric(self, reads: Mapping[str, Tensor] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Per module (c²BᵀB, AAᵀ), [r, r] float64, with other A where `reads` has them."""
        out = {}
        for name, a in (self.a if reads is None else reads).items():
            b, wide = self.b[name].double(), a.double()
            out[name] = (self.scaling[name] ** 2 * (b.T @ b), wide @ wide.T)
        return out

    def fingerprint(self, reads: Mapping[str, Tensor]) -> str:
        """`fisher.lora.fingerprint` of the adapter that has these A."""
        return digest_of((name, self.scaling[name], a, self.b[name]) for name, a in reads.items())


@dataclass(frozen=True)
class Filtered:
    """The patch with its inputs filtered, cost inputs weighing `mu`: its row space A', and both Fishers of its core.

    lora_A: A' [r, d_in] float32 per module. gain, cost: core-space Fishers (structure "full") of the patch c·B S A', as
    `fisher_accumulate(point="reference")` would take them of a model that carries A'.

    Example:
        >>> filtered = evidence.filter(mu=3.0)
        >>> patch = filtered.subspace(folds=2).soft(kl_budget=0.01)
        >>> A, B, scaling = filtered.factors(patch.coordinates)["model.layers.0.self_attn.q_proj"]
        >>> A.shape, B.shape, scaling
        (torch.Size([3, 32]), torch.Size([32, 3]), 2.0)
    """

    mu: float
    lora_A: dict[str, Tensor]
    gain: Fisher = field(repr=False)
    cost: Fisher = field(repr=False)
    weights: Weights = field(repr=False)

    def subspace(self, **options: Unpack[PencilOptions]) -> Subspace:
        """`sst_kernels.subspace` of both Fishers; its patches know their factors (`Patch.apply`, `Patch.save`)."""
        return replace(subspace(self.gain, self.cost, **options), lora=self._lora)

    def factors(self, coordinates: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, float]]:
        """The LoRA factors (A', B S', c) of a patch with these core coordinates S' (`Patch.coordinates`): ΔW' = c · B S' A'."""
        return self._lora.at(coordinates)

    @property
    def _lora(self) -> Lora:
        return Lora(self.gain.meta["adapter"], self.lora_A, self.weights.b, self.weights.scaling)


class Evidence:
    """Both sides' gradients and input moments at the reference point. Make one with `Evidence.of(model, ...)` or `Evidence.load`.

    Example:
        >>> evidence = sst.Evidence.of(model, adapter="safety")
        >>> with evidence.accumulate("gain") as reading:
        ...     for batch in harm_batches:
        ...         reading.backward(batch, weights=sst.opening_weights(batch["labels"]))
        >>> with evidence.accumulate("cost") as reading:
        ...     for batch in benign_batches:
        ...         reading.backward(batch, labels="mc", draws=2)
        >>> evidence = evidence.condense()          # in a basis: less to keep
        >>> evidence.save("evidence.safetensors")
        >>> filtered = evidence.filter(mu=3.0)      # A', and both Fishers of it
        >>> for patch in filtered.subspace().path([0.005, 0.02]):
        ...     lora = filtered.factors(patch.coordinates)  # per module (A', B S', c)

    Attributes:
        gain, cost, guard: the `Side`s. The guard's rows are the gain's loss on samples where it is not wanted; it may stay empty.
        weights: the adapter that was read.
        basis: where rows and moments are kept in (see `Basis`), None for all of d_in.
        about: what the user says of model, template and data; `merge` and `resume` refuse another `about`.
        notes: what else its maker wants to find again; of merged evidence what both agree in.
    """

    def __init__(
        self,
        weights: Weights,
        sides: Sequence[Side],
        meta: dict[str, Any],
        basis: Basis | None,
        notes: Mapping[str, str] | None = None,
    ):
        self.weights, self.meta, self.basis = weights, meta, basis
        self.notes = dict(notes or {})
        self.gain, self.cost, self.guard = sides
        self._open: Callable[[Side, Callable[[Side], None]], Reading] | None = None
        self._last: tuple[Any, Filtered] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        adapter: str = "default",
        *,
        basis: Basis | None = None,
        rank: int | None = 512,
        dtype: Literal["float32", "bfloat16"] = "float32",
        modules: str | Iterable[str] | None = None,
        state_device: torch.device | str | None = None,
        nonfinite: Literal["raise", "skip"] = "raise",
        seed: int = 0,
        group: Any = None,
        about: Mapping[str, str] | None = None,
    ) -> Self:
        """Evidence about `adapter` that holds nothing yet.

        Args:
            model: a model with PEFT LoRA layers, `adapter` among the active ones; others stay on.
            basis: keep gradients and moments in these coordinates (`inputs.basis_of`); None keeps all of d_in, exactly.
            rank: columns of the streaming sketches of moments of modules with d_in > 4·rank; None keeps [d_in, d_in] for all. Not
                used with a basis, whose moments are whole.
            dtype: of the kept gradients; "bfloat16" rounds each once, for half the memory.
            modules: regular expression for, or names of, the modules to include; all that carry the adapter by default.
            state_device: where gradients are kept, "cpu" to leave device memory to the model; beside the first module by default.
            nonfinite: "raise" names the batch and sample whose gradients are not finite; "skip" leaves such samples out.
            seed: of the sketches' test matrices.
            group: torch.distributed group over which passes are shared: every rank brings its part and ends with the total.
            about: what the evidence depends on beside the adapter's weights (model, template).

        Raises ValueError for what `find_sites` refuses and a basis of other modules or another adapter; MemoryError when the moments would not fit.
        """
        rank = None if rank is None else whole("rank", rank)
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f'dtype: expected "float32" or "bfloat16", got {dtype!r}')
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f'nonfinite: expected "raise" or "skip", got {nonfinite!r}')
        model = unwrapped(model)
        sites = find_sites(model, adapter, modules)
        weights = Weights.of(sites)
        if basis is None:
            require_moments(model, sites, rank)
        else:
            basis.check_holds(weights.a)
        device = None if state_device is None else torch.device(state_device)
        widths = {s.name: width_of(s) if basis is None else len(basis[s.name]) for s in sites}
        meta = {
            "space": "reads",
            "structure": "full",
            "scope": "global",
            "sample": "sequence",
            "count": "sequences",
            "point": "reference",
            "point_given": True,
            "adapter": adapter,
            "fingerprint": fingerprint(sites),
            "about": dict(about or {}),
            "basis": None if basis is None else basis.fingerprint(),
        }
        blocks = [Block(s.name, s.name, (s.rank, widths[s.name])) for s in sites]
        make = lambda name: Side(  # noqa: E731
            blocks,
            MomentSums(widths, None if basis is not None else rank, seed),
            {**meta, "side": name},
            metric=weights.metric(),
            dtype=getattr(torch, dtype),
            device=device,
        )
        out = cls(weights, [make(name) for name in SIDES], meta, basis)

        def opened(side: Side, complete: Callable[[Side], None]) -> Reading:
            if fingerprint(sites) != meta["fingerprint"]:
                raise ValueError(f"the weights of {adapter!r} have changed since Evidence.of: make the evidence anew")
            settings = {"reduction": "mean", "grad_scale": None, "nonfinite": nonfinite, "group": group}
            return Reading(model, sites, side, basis, complete, **settings)

        out._open = opened
        return out

    @property
    def about(self) -> dict[str, str]:
        return self.meta["about"]

    @property
    def nbytes(self) -> int:
        """Bytes of all sides."""
        return sum(side.nbytes for side in self._sides.values())

    @property
    def _sides(self) -> dict[SideName, Side]:
        """Those that have to hold data, and the guard where it does."""
        guard: dict[SideName, Side] = {"guard": self.guard} if self.guard.rows else {}
        return {"gain": self.gain, "cost": self.cost, **guard}

    def accumulate(
        self,
        side: SideName,
        *,
        sequences: int | None = None,
        losses: int = 1,
        resume: str | os.PathLike | None = None,
    ) -> Reading:
        """Context manager of a pass over one side's data: run `reading.backward(batch)` for every batch, or a loop of your own.

        In a loop of your own (`model(**batch).loss.backward()`, `sequence_nll`, `declared_loss`) every forward pass has one backward.
        The adapter is off while the context is open. What was read is added when it is left; after an error the evidence is as it was
        before. `sequences`: how many rows this process will bring of each of its `losses` (each draw is a row), if known:
        MemoryError, before the first batch, when there is no room. `resume`: a checkpoint of `Reading.save_checkpoint`.
        """
        if side not in SIDES:
            raise ValueError(f'side: expected "gain", "cost" or "guard", got {side!r}')
        if self._open is None:
            raise RuntimeError(
                "this evidence was loaded or condensed: accumulate into one made by Evidence.of, and merge that"
            )
        own = getattr(self, side).empty()
        reading = self._open(own, partial(self._take_in, side))
        if sequences is not None:
            size = whole("sequences", sequences, 0) * whole("losses", losses) * own.width * own.dtype.itemsize
            where = own.device or reading.sites[0].device
            half = {} if own.dtype == torch.bfloat16 else {'dtype="bfloat16"': Estimate(size // 2, size // 2)}
            require(
                "the gradients that an evidence keeps",
                Estimate(size, size),
                where,
                half,
                'use state_device="cpu" or a basis',
            )
            own.reserve(sequences)
        if resume is not None:
            reading.load_checkpoint(resume)
        return reading

    def _take_in(self, name: SideName, read: Side) -> None:
        """Add what a pass has read."""
        own: Side = getattr(self, name)
        if own.rows:
            own.merge(read)
        else:
            setattr(self, name, read)
        self._last = None

    @stage("filter")
    def filter(self, mu: float, *, losses: Mapping[str, float] | None = None, guard: float = GUARD) -> Filtered:
        """The patch with its inputs filtered, cost inputs weighing `mu`; 0 leaves A as it is.

        `filter_inputs` of the kept moments, and the Fishers of that patch, without the model. With a basis A' is the best one in its
        span. `losses`: factors of the gain's named losses, whose gradients add up; 1 each by default. `guard`: trace of the guard's rows
        over that of the cost's. They join the cost, and predictions of it are larger by what a patch does to them.

        Raises ValueError for μ outside 0 … 1e100, a negative `guard`, losses that were not accumulated, and a side without data.
        """
        check_mu(mu)
        self._check_complete()
        if not 0 <= guard < float("inf"):
            raise ValueError(f"guard: expected a finite number that is not negative, got {guard}")
        asked = mu, None if losses is None else tuple(sorted(losses.items())), guard
        if self._last is not None and self._last[0] == asked:
            return self._last[1]
        given = {name: a.double() for name, a in self.weights.a.items()}
        columns = given  # A' in the coordinates that rows are kept in
        if self.basis is not None:
            columns = {name: self.basis.coordinates(name, a) for name, a in given.items()}
            if mu:
                columns = filtered_in_basis(columns, self.basis, self.gain.moments, self.cost.moments, mu)
            reads = {name: (a.cpu() @ self.basis[name].cpu().double()).float() for name, a in columns.items()}
            reads = reads if mu else dict(self.weights.a)
        elif mu:
            columns = {
                n: new for n, (new,) in filtered_lora_A(given, self.gain.moments, self.cost.moments, [mu]).items()
            }
            reads = {name: a.to("cpu", torch.float32) for name, a in columns.items()}
        else:
            reads = dict(self.weights.a)
        meta = {**self.meta, "space": "core", "fingerprint": self.weights.fingerprint(reads)}
        del meta["about"], meta["basis"]
        metric = self.weights.metric(reads)
        gain = _core(self.gain, columns, meta, metric, losses)
        cost = _core(self.cost, columns, meta, metric, None)
        if guard and self.guard.rows:
            cost = _guarded(cost, _core(self.guard, columns, meta, metric, None), guard)
        found = Filtered(mu, reads, gain, cost, self.weights)
        self._last = asked, found
        return found

    def subspace(
        self, mu: float = 3.0, *, losses: Mapping[str, float] | None = None, **options: Unpack[PencilOptions]
    ) -> Subspace:
        """The solved pencil of the patch filtered at `mu` (`filter`); `options` as in `sst_kernels.subspace`."""
        return self.filter(mu, losses=losses).subspace(**options)

    def _check_complete(self) -> None:
        for name, side in self._sides.items():
            if not side.counts.sequences:
                raise ValueError(f"the {name} side holds no sequences: accumulate it first")

    def condense(self, mus: Sequence[float] = MUS) -> Evidence:
        """The same evidence in a `Basis` of the filters at `mus`: d_in / m times smaller (22 at 135M and r = 4, 40 at 7B and
        r = 16), and decisions in fractions of a second.

        Exact at these μ (to rounding), and between them up to what `Basis` says; `read_loss` tells. Itself where there is a basis.
        """
        if self.basis is not None:
            return self
        self._check_complete()
        basis = Basis.of(self.weights.a, self.gain.moments, self.cost.moments, mus)
        meta = {**self.meta, "basis": basis.fingerprint()}
        sides = []
        for label, side in zip(SIDES, (self.gain, self.cost, self.guard)):
            blocks = [Block(b.name, b.module, (b.shape[0], len(basis[b.name]))) for b in side.blocks]
            about = {**meta, "side": label}
            new = Side(
                blocks,
                side.moments.projected(basis),
                about,
                metric=side.metric,
                dtype=side.dtype,
                device=side.device,
            )
            new.skipped = list(side.skipped)
            for name, fisher in side.rows.items():
                rows = fisher.rows()
                part = new.loss(name, rows.device)
                assert isinstance(part.joint, Full)
                part.joint.append(_times(rows, side, basis.columns, rows.new_empty(len(rows), new.width)))
                part.joint.counts = copy.copy(fisher.counts)
                part.groups = list(fisher.groups)
                part.meta |= {key: fisher.meta[key] for key in ("labels", "groups")}
            sides.append(new)
        return Evidence(self.weights, sides, meta, basis, self.notes)

    def merge(self, other: Evidence) -> None:
        """Add the evidence of other data about the same patch. ValueError when model, adapter, coordinates or losses differ."""
        for key in ("fingerprint", "adapter", "about", "basis"):
            if self.meta[key] != other.meta[key]:
                raise ValueError(f"cannot merge evidence: {key} differs ({self.meta[key]!r} and {other.meta[key]!r})")
        pairs = [(getattr(self, name), getattr(other, name)) for name in SIDES]
        for own, theirs in pairs:
            own.check_same(theirs)
        for own, theirs in pairs:
            if theirs.rows:
                own.merge(theirs)
        self.notes = {key: note for key, note in self.notes.items() if other.notes.get(key) == note}
        self._last = None

    def save(self, path: str | os.PathLike) -> None:
        """Write everything to one safetensors file with a checksum, atomically. Raises `storage.StorageError`."""
        tensors = {f"weights/{n}/A": a for n, a in self.weights.a.items()}
        tensors |= {f"weights/{n}/B": b for n, b in self.weights.b.items()}
        header: dict[str, Any] = {"kind": "evidence", "meta": self.meta, "scaling": self.weights.scaling, "sides": {}}
        header["notes"] = self.notes
        header["blocks"] = [[b.name, *b.shape] for b in self.gain.blocks]
        for name, side in self._sides.items():
            header["sides"][name], kept = side.pack()
            tensors |= {f"{name}/{key}": tensor for key, tensor in kept.items()}
        if self.basis is not None:
            header["mus"] = self.basis.mus
            tensors |= {f"basis/{n}/columns": q for n, q in self.basis.columns.items()}
            tensors |= {f"basis/{n}/dual": q for n, q in self.basis.dual.items()}
            tensors |= {f"basis/{n}/ridge_{i}": r for n, pair in self.basis.ridges.items() for i, r in enumerate(pair)}
        write_tensors(path, {name: tensor.detach() for name, tensor in tensors.items()}, header)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> Evidence:
        """Read what `save` wrote. ValueError when the file is no evidence, is damaged, or has another schema."""
        header, tensors = read_tensors(path, device)
        if header.get("kind") != "evidence":
            raise ValueError(
                f"{path} holds a {header.get('kind')!r}, expected evidence (sst-merge collect, Evidence.save)"
            )
        try:
            names = [name for name, *_ in header["blocks"]]
            blocks = [Block(name, name, (p, q)) for name, p, q in header["blocks"]]
            part = lambda kind, leaf: {n: tensors[f"{kind}/{n}/{leaf}"] for n in names}  # noqa: E731
            weights = Weights(
                {n: t.cpu() for n, t in part("weights", "A").items()},
                {n: t.cpu() for n, t in part("weights", "B").items()},
                header["scaling"],
            )
            basis = None
            if "mus" in header:
                columns, dual, *ridges = (part("basis", leaf) for leaf in ("columns", "dual", "ridge_0", "ridge_1"))
                basis = Basis(columns, dual, {n: (ridges[0][n], ridges[1][n]) for n in names}, header["mus"])
            sides: list[Side] = []
            for name in SIDES:
                if name not in header["sides"]:
                    sides.append(sides[-1].empty(name))
                    continue
                about = header["sides"][name]
                moments = MomentSums(*(about["moments"][key] for key in ("widths", "rank", "seed")))
                dtype = getattr(torch, about["dtype"].removeprefix("torch."))
                meta = {**header["meta"], "side": name}
                side = Side(blocks, moments, meta, metric=weights.metric(), dtype=dtype, device=torch.device(device))
                own = {k.removeprefix(f"{name}/"): t for k, t in tensors.items() if k.startswith(f"{name}/")}
                side.unpack(about, own)
                sides.append(side)
            return cls(weights, sides, dict(header["meta"]), basis, header["notes"])
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path}: its header does not describe evidence ({error!r}): collect it again") from error

    def __repr__(self) -> str:
        sides = ", ".join(f"{n}={s.counts.sequences} sequences" for n, s in self._sides.items())
        kept = "all of d_in" if self.basis is None else f"a basis of {max(len(q) for q in self.basis.values())}"
        return f"Evidence({len(self.weights.a)} modules, {sides}, {kept}, bytes={self.nbytes})"


def _core(
    side: Side,
    columns: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    metric: Mapping[str, tuple[Tensor, Tensor]],
    losses: Mapping[str, float] | None,
) -> Fisher:
    """The core-space Fisher of one side's rows for A' = `columns` in the coordinates that they are kept in."""
    factors = dict.fromkeys(side.rows, 1.0) if losses is None else dict(losses)
    if not factors:
        raise ValueError(f"losses: expected factors of some of {sorted(side.rows)}, got none")
    if unknown := sorted(set(factors) - set(side.rows)):
        raise ValueError(f"losses {unknown} were not accumulated; there are {sorted(side.rows)}")
    blocks = [Block(b.name, b.module, (b.shape[0], len(columns[b.name]))) for b in side.blocks]
    first = side.rows[next(iter(factors))]
    assert first.joint is not None
    total = torch.zeros(first.counts.sequences, sum(b.size for b in blocks), device=first.joint.device)
    for name, factor in factors.items():
        scaled = {n: factor * a for n, a in columns.items()} if factor != 1 else columns
        _times(side.rows[name].rows(), side, scaled, total, add=True)
    joint = Full((total.shape[1], 1), device=total.device)
    joint.append(total, first.counts)
    about = {**meta, "labels": first.meta["labels"], "groups": first.meta["groups"]}
    return Fisher(blocks, {}, joint, metric, about, list(first.groups))


def _guarded(cost: Fisher, guard: Fisher, share: float) -> Fisher:
    """The cost with the guard's rows in it: what it was, and `share` of its trace from them. Labels per sequence stay the cost's."""
    assert isinstance(cost.joint, Full)
    parts = cost.rows(), guard.rows()
    energies = [float(x.double().square().sum()) / len(x) for x in parts]
    if not energies[1]:
        return cost
    total = sum(map(len, parts))
    scales = [(total / len(x) * f) ** 0.5 for x, f in zip(parts, (1.0, share * energies[0] / energies[1]))]
    per = {key: value / len(parts[0]) for key, value in asdict(cost.counts).items()}
    joint = Full((parts[0].shape[1], 1), device=parts[0].device)
    joint.append(
        torch.cat([x * scale for x, scale in zip(parts, scales)]),
        Counts(total, round(per["tokens"] * total), round(per["labels"] * total)),
    )
    first = max(cost.groups, default=-1) + 1
    groups = [*cost.groups, *(first + g for g in guard.groups)]
    return Fisher(list(cost.blocks.values()), {}, joint, cost.metric, cost.meta, groups)


def _times(rows: Tensor, side: Side, columns: Mapping[str, Tensor], out: Tensor, *, add: bool = False) -> Tensor:
    """Per block G [r, m] -> G columnsᵀ [r, q], for all rows; float32 products."""
    at = 0
    for block in side.blocks:
        wide = columns[block.name].to(rows.device, torch.float32)
        part = rows[:, side.columns[block.name]].reshape(-1, block.shape[1]).float() @ wide.mT
        size = block.shape[0] * len(wide)
        into = out[:, at : at + size]
        into.copy_(into + part.view(len(rows), size) if add else part.view(len(rows), size))
        at += size
    return out


def _lora_a(site: LoraSite) -> nn.Module:
    return site.lora_a


def _lora_b(site: LoraSite) -> nn.Module:
    return site.lora_b
