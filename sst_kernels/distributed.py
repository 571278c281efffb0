"""Combining state over the ranks of a torch.distributed group, in few collectives.

A structure says what it needs as a generator (`Structure.reduction`) that yields `Sum` and `Gather` requests and goes on when
they have been answered. `reduce_over_ranks` advances the generators of all blocks in step, so that the sums of hundreds of
blocks travel in one bucketed all-reduce. All ranks end with the same bits, and a run of the same world size repeats them.
`torchrun` or `accelerate launch` start the processes; nothing here does.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 64 << 20


@dataclass
class Sum:
    """Replace each of `tensors` in place by its sum over ranks."""

    tensors: Sequence[Tensor]


@dataclass
class Gather:
    """Answered by an iterator over the `rows` [N_rank, width] of all ranks in rank order, one rank's in memory at a time."""

    rows: Tensor


Reduction = Generator[Sum | Gather, Any, None]


def reduce_over_ranks(reductions: Iterable[Reduction], group: Any = None) -> None:
    """Run `reductions`, the same on every rank, to their ends; the sums that they ask for in one round share buckets."""
    waiting: list[tuple[Reduction, Any]] = [(reduction, None) for reduction in reductions]
    while waiting:
        requests = [(reduction, _next(reduction, answer)) for reduction, answer in waiting]
        requests = [(reduction, request) for reduction, request in requests if request is not None]
        sum_over_ranks([t for _, request in requests if isinstance(request, Sum) for t in request.tensors], group)
        waiting = [(r, gather_rows(q.rows, group) if isinstance(q, Gather) else None) for r, q in requests]


def sum_over_ranks(tensors: Sequence[Tensor], group: Any = None, *, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Replace each tensor by its sum over ranks, in place. Tensors of one dtype and device travel in buckets."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        bucket: list[Tensor] = []
        for tensor in alike:
            if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > bucket_bytes:
                _sum_bucket(bucket, group)
                bucket = []
            bucket.append(tensor)
        _sum_bucket(bucket, group)


def gather_rows(rows: Tensor, group: Any = None) -> Iterator[Tensor]:
    """The `rows` [N_rank, width] of every rank in rank order; N_rank may differ and may be zero.

    All ranks must exhaust the iterator: each piece is broadcast when it is asked for.
    """
    lengths = gather_objects(len(rows), group)
    carrier, me = _carrier(rows.device, group), dist.get_rank(group)
    for rank, length in enumerate(lengths):
        piece = rows.to(carrier) if rank == me else rows.new_empty(length, rows.shape[1], device=carrier)
        if length:
            piece = piece.contiguous()
            dist.broadcast(piece, _global_rank(rank, group), group=group)
        yield piece.to(rows.device)


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """The picklable `value` of every rank, in rank order. Small values only."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def raise_together(error: Exception | None, group: Any = None) -> None:
    """Every rank calls this at the same point; if any brings an error, all raise, the others naming it.

    Without it, the ranks that are well would wait for the failed one in their next collective.
    """
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
    if failed:
        raise RuntimeError("another rank failed, so there is no total. " + "; ".join(failed))


def share_by_cost(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Items dealt to `ranks`, the costliest first and always to the least loaded: the same answer on every rank."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += costs[item]
    return shares


def _next(reduction: Reduction, answer: Any) -> Sum | Gather | None:
    try:
        return reduction.send(answer)
    except StopIteration:
        return None


def _sum_bucket(tensors: Sequence[Tensor], group: Any) -> None:
    if not tensors:
        return
    carrier = _carrier(tensors[0].device, group)
    if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].device == carrier:
        dist.all_reduce(tensors[0], group=group)
        return
    flat = torch.cat([t.reshape(-1) for t in tensors]).to(carrier)
    dist.all_reduce(flat, group=group)
    for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(piece.reshape(tensor.shape))


def _carrier(device: torch.device, group: Any) -> torch.device:
    """Where a tensor must lie for the group's backend to move it: NCCL alone does not take CPU tensors."""
    backends = dist.get_backend_config(group)
    if device.type in backends or "cuda" not in backends:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _global_rank(rank: int, group: Any) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
