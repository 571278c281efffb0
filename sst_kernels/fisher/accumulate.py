"""`fisher_accumulate`: Fisher statistics of a LoRA adapter, gathered from the user's own forward and backward passes."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sst_kernels.fisher.accumulator import Accumulator
from sst_kernels.fisher.base import Block
from sst_kernels.fisher.fisher import Fisher
from sst_kernels.fisher.lora import LoraSite, find_sites, fingerprint, unwrapped, weight_of
from sst_kernels.fisher.memory import reserve

Point = Literal["patched", "reference"] | float | Mapping[str, Tensor]
Space = Literal["core", "factor"]
StructureName = Literal[
    "full", "diagonal", "kronecker", "kronecker_lowrank", "eigen_kronecker", "kronecker_svd", "lowrank", "vila"
]
Reduction = Literal["mean", "sum"]
Nonfinite = Literal["raise", "skip"]


class StructureOptions(TypedDict, total=False):
    """What structures take beside what all passes have; each takes its own (see its class)."""

    rows: Literal["keep", "fold"]
    dtype: Literal["float32", "bfloat16"]
    rank: int
    seed: int
    sketch: int | None
    centred: bool
    approx: Literal["expand", "reduce"]
    basis: Any


def fisher_accumulate(
    model: nn.Module,
    adapter: str = "default",
    *,
    space: Space = "core",
    structure: StructureName = "full",
    scope: Literal["global", "module"] = "global",
    point: Point | None = None,
    sample: Literal["sequence", "token"] = "sequence",
    count: Literal["sequences", "tokens", "labels"] = "sequences",
    reduction: Reduction = "mean",
    grad_scale: float | None = None,
    nonfinite: Nonfinite = "raise",
    modules: str | Iterable[str] | None = None,
    group: Any = None,
    state_device: torch.device | str | None = None,
    resume: str | os.PathLike | None = None,
    sequences: int | None = None,
    **options: Unpack[StructureOptions],
) -> Accumulator:
    """Context manager that accumulates the Fisher matrix of `adapter` over every backward pass run inside it.

    The user's loop stays as it is: `model(**batch).loss.backward()` with labels, or `sequence_nll(model, batch)`, or any
    loss inside `declared_loss`. Parameters, their gradients and the optimizer are untouched. All samples of a batch are told
    apart, so any batch composition, padding side, packing (`cu_seq_lens_q`), gradient accumulation and gradient checkpointing
    gives the statistics of one backward per sample.

    Args:
        model: a model with PEFT LoRA layers (recognised by `lora_A`, `lora_B`, `scaling`), `adapter` among the active ones.
        space: "core" (ΔW(S) = c·B S A, coordinates S [r, r]) or "factor" (A [r, d_in] and B [d_out, r]; depends on the gauge).
        structure: what is kept: see `sst_kernels.fisher.structures`; `**options` go to it (e.g. `rank=64`).
        scope: "global" keeps the correlations between modules where the structure can ("full", "lowrank" in core space),
            "module" keeps each module by itself.
        point: where gradients are taken: "patched" (S = I; the default, which leaves the forward pass as it is, a training step
            too), "reference" (S = 0: patch off), a number α (S = αI), or S [r, r] per module. The model computes at this point
            while the context is open. Merges take both Fishers at the reference, where the patch has decided nothing yet.
        sample: "sequence" (tokens are summed before squaring) or "token".
        count: what answers are divided by: "sequences", "tokens" or "labels".
        reduction: how the model's own loss reduces: "mean" over the labels of the batch (transformers) or "sum".
        grad_scale: the factor between the loss and what `backward()` is called on (GradScaler, 1/accumulation steps). None
            measures it at the loss tensor, exactly; a number states it for losses that the hook cannot see.
        nonfinite: "raise" names the batch and sample; "skip" leaves such samples out and counts them in `accumulator.skipped`
            ("full", "diagonal" and "lowrank" in core space).
        modules: regular expression for, or names of, the modules to include; all that carry the adapter by default.
        group: torch.distributed group (`torch.distributed.group.WORLD`) over which the pass is shared: each rank runs its part of the
            data, possibly none, and on leaving the context every rank holds the total. An exception on one rank is raised on all.
        state_device: where the state lives, "cpu" to leave device memory to the model; beside each module by default. What a batch
            adds is computed beside the module all the same and copied while the model goes on: rows for the joint structures of
            core space, for others the state of one block and batch (see `docs/scaling.md`).
        sequences: how many this process will bring, if known: memory is estimated, and set aside where rows are kept, before the
            first batch. MemoryError, naming what would fit, when it is not there; over a group, room for the total of ranks that bring
            as many.
        resume: a checkpoint of `save_checkpoint` to go on from; `.progress` says how far it had come.

    Raises ValueError for what would make the statistics wrong (see `find_sites`, `read_layout`) and RuntimeError on exit when no
    backward pass was seen or a module's hook never fired.

    Example:
        >>> with sst.fisher_accumulate(model, "safety", structure="diagonal") as accumulator:
        ...     for batch in harm_batches:
        ...         _ = model(**batch).loss.backward()
        >>> block = accumulator.fisher["model.layers.0.self_attn.q_proj"]
        >>> block.diagonal().shape
        torch.Size([3, 3])
    """
    _choice("space", space, get_args(Space))
    _choice("reduction", reduction, ("mean", "sum"))
    _choice("nonfinite", nonfinite, ("raise", "skip"))
    _usable(state_device)
    if grad_scale is not None and not 0 < abs(grad_scale) < float("inf"):
        raise ValueError(f"grad_scale must be finite and not zero, got {grad_scale}")
    synchronised = isinstance(
        model, nn.parallel.DistributedDataParallel
    )  # waits for gradients of the branch's own weights
    model = unwrapped(model)
    sites = find_sites(model, adapter, modules)
    where = "patched" if point is None else point
    cores = _cores_at(where, sites)
    fisher = Fisher.empty(
        _blocks(sites, space),
        structure,
        devices={site.name: site.device if state_device is None else torch.device(state_device) for site in sites},
        metric={site.name: site.metric() for site in sites},
        scope=scope,
        sample=sample,
        count=count,
        options=options,
        meta={
            "space": space,
            "adapter": adapter,
            "fingerprint": fingerprint(sites),
            "point": where if isinstance(where, str | float | int) else f"custom {_digest(cores)}",
            "point_given": point is not None,
        },
    )
    if sequences is not None:
        reserve(fisher, sequences, options, ranks=1 if group is None else dist.get_world_size(group))
    if nonfinite == "skip" and fisher.joint is None:
        raise ValueError(
            f'nonfinite="skip" cannot take a sample back from the streaming structure {structure!r} in {space} space: '
            'use "full", "diagonal" or "lowrank" in core space, or nonfinite="raise"'
        )
    accumulator = Accumulator(
        model, sites, fisher, cores, branch=synchronised,
        reduction=reduction, grad_scale=grad_scale, nonfinite=nonfinite, group=group,
    )  # fmt: skip
    if resume is not None:
        accumulator.load_checkpoint(resume)
    return accumulator


def _blocks(sites: list[LoraSite], space: Space) -> list[Block]:
    if space == "core":
        return [Block(s.name, s.name, (s.rank, s.rank)) for s in sites]
    pairs = ((s, part, weight_of(w).shape) for s in sites for part, w in (("lora_A", s.lora_a), ("lora_B", s.lora_b)))
    return [Block(f"{s.name}.{part}", s.name, (shape[0], shape[1])) for s, part, shape in pairs]


def _cores_at(point: Point, sites: list[LoraSite]) -> dict[str, float | Tensor | None]:
    """Per module: None for S = I, a float α for αI, or S itself."""
    if isinstance(point, str):
        _choice("point", point, ("patched", "reference"))
        return dict.fromkeys((s.name for s in sites), None if point == "patched" else 0.0)
    if isinstance(point, Mapping):
        for site in sites:
            core = point.get(site.name)
            if core is None or tuple(core.shape) != (site.rank, site.rank):
                got = None if core is None else tuple(core.shape)
                raise ValueError(f"point[{site.name!r}] must be a [{site.rank}, {site.rank}] tensor, got {got}")
        return {s.name: point[s.name].detach() for s in sites}
    if not math.isfinite(point):
        raise ValueError(f"point must be finite, got {point}")
    return dict.fromkeys((s.name for s in sites), None if point == 1 else float(point))


def _digest(cores: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, core in cores.items():
        digest.update(name.encode() + core.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]


def _usable(device: torch.device | str | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'state_device {device!r} cannot be used ({reason}); give "cpu" or "cuda:0"') from error


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
