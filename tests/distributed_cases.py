"""What the ranks of tests/test_distributed.py run: importable by spawned processes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sst_kernels import Evidence, fisher_accumulate, input_moments, sequence_nll, subspace
from sst_kernels.fisher import Fisher
from sst_kernels.fisher.structures.moment import dense
from tests.models import tiny_batch, tiny_lora

FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # torch 2.6 shards on GPUs only
SAMPLES = 11
# Batches of two, the last one partial, dealt unevenly; the last rank has none.
SHARES = {2: [[0, 2, 4, 5], [1, 3]], 4: [[0, 2], [1, 3, 4], [5], []]}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full-module": {"scope": "module"},
    "full-fold": {"scope": "module", "rows": "fold"},
    "diagonal": {"structure": "diagonal"},
    "diagonal-centred": {"structure": "diagonal", "centred": True},
    "lowrank": {"structure": "lowrank", "rank": 32},
    "lowrank-small": {"structure": "lowrank", "rank": 3},
    "kronecker": {"structure": "kronecker", "space": "factor"},
    "kronecker_lowrank": {"structure": "kronecker_lowrank", "space": "factor", "rank": 8},
    "kronecker_svd": {"structure": "kronecker_svd"},
    "vila": {"structure": "vila", "space": "factor"},
}


def batches() -> list[dict[str, Tensor]]:
    whole = tiny_batch(SAMPLES)
    return [{k: v[i : i + 2] for k, v in whole.items()} for i in range(0, SAMPLES, 2)]


def accumulate(options: dict[str, Any], share: list[int], group: Any = None, model: Any = None) -> Fisher:
    """One pass over the batches of `share`; each sample is its own group, named alike on all ranks."""
    model, data = tiny_lora() if model is None else model, batches()
    with fisher_accumulate(model, "safety", group=group, **options) as pass_:
        for i in share:
            names = range(2 * i, 2 * i + len(data[i]["input_ids"]))
            sequence_nll(model, data[i], groups=list(names)).backward()
    return pass_.fisher


@torch.no_grad()
def inputs(share: list[int], sketch: int | None, group: Any = None) -> dict[str, Any]:
    """Input moments over the batches of `share`, picklable."""
    model, data = tiny_lora(), batches()
    with input_moments(model, "safety", rank=sketch, group=group) as pass_:
        for i in share:
            model(**data[i])
    whole = {name: dense(moment) for name, moment in pass_.items()}
    return {"tokens": pass_.tokens, "shared": pass_.shared, "moments": whole}


def evidence(share: list[int], group: Any = None, **options: Any) -> Evidence:
    """Two named losses of each sample on the gain side, read in two passes; two draws on the cost side, groups not given."""
    found, data = Evidence.of(tiny_lora(**options), "safety", group=group), batches()
    for part in (share[:1], share[1:]):
        with found.accumulate("gain") as reading:
            for i in part:
                ones = torch.ones(data[i]["labels"].shape)
                names = range(2 * i, 2 * i + len(ones))
                reading.backward(data[i], weights={"a": ones, "b": 2 * ones}, groups=list(names))
            if not part and group is None:
                break
    with found.accumulate("cost") as reading:
        for i in share:
            generator = torch.Generator().manual_seed(i)
            reading.backward(data[i], labels="mc", draws=2, generator=generator)
    return found


def evidence_answers(found: Evidence) -> dict[str, Any]:
    """What a test compares, picklable: all state, and a decision."""
    out: dict[str, Any] = {"patch": found.subspace(1.0, folds=2).soft(mu=0.1).coordinates}
    for name, side in (("gain", found.gain), ("cost", found.cost)):
        _, tensors = side.pack()
        out[name] = {
            "state": {k: v.clone() for k, v in tensors.items()},
            "moments": {k: dense(m) for k, m in side.moments.items()},
            "counts": vars(side.counts),
            "tokens": side.moments.tokens,
            "groups": side.rows[next(iter(side.rows))].groups,
        }
    return out


def answers(fisher: Fisher) -> dict[str, Any]:
    """What a test compares, picklable: raw state, dense blocks, counts, groups."""
    _, tensors = fisher.pack()
    certificate = getattr(fisher.joint, "certificate", None)
    return {
        "state": {k: v.clone() for k, v in tensors.items()},
        "dense": [fisher[name].dense() for name in list(fisher)[:3]],
        "counts": vars(fisher.counts),
        "groups": fisher.groups,
        "certificate": certificate,
        "rounding": getattr(fisher.joint, "rounding", None),
    }


def on_rank(rank: int, address: str, results: Any) -> None:
    """Everything at once, since starting processes costs more than the work."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=4)
    pair = dist.new_group([0, 1])
    out: dict[Any, Any] = {}
    for world, group in ((4, dist.group.WORLD), (2, pair)):
        if rank >= world:
            continue
        share = SHARES[world][rank]
        for case, options in CASES.items():
            out[case, world] = answers(accumulate(options, share, group))
        out["again", world] = answers(accumulate(CASES["kronecker"], share, group))
        first = accumulate(CASES["kronecker"], share, group)
        eigen = {"structure": "eigen_kronecker", "space": "factor", "basis": first}
        out["eigen_kronecker", world] = answers(accumulate(eigen, share, group))
        out["solve", world] = _solve(share, group)
        out["evidence", world] = evidence_answers(evidence(share, group))
        out["inputs", world] = {rank: inputs(share, rank, group) for rank in (None, 4)}
    if rank < 2:
        out["ddp"] = answers(_ddp(rank, pair))
        if FSDP2_ON_CPU:
            out["fsdp"] = answers(_fsdp(rank, pair))
    out["error"] = _failing(rank)
    out["mismatch"] = _mismatched(rank)
    for fault in ("batch", "adapter", "losses"):
        out["evidence", fault] = _failing_evidence(rank, fault)
    results[rank] = out
    dist.barrier()
    dist.destroy_process_group()


def _solve(share: list[int], group: Any) -> dict[str, Any]:
    """A module-scope pencil over the ranks, and the same by this rank alone."""
    gain, cost = (accumulate({"point": point}, share, group) for point in ("patched", "reference"))
    shared, alone = (subspace(gain, cost, scope="module", group=g) for g in (group, None))
    return {
        "shared": shared.values,
        "alone": alone.values,
        "patches": [s.soft(kl_budget=0.05) for s in (shared, alone)],
    }


def _ddp(rank: int, group: Any) -> Fisher:
    model = tiny_lora()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    with wrapped.no_sync():
        return accumulate({}, SHARES[2][rank], group, wrapped)


def _fsdp(rank: int, group: Any) -> Fisher:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_lora()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return accumulate({}, [[0, 2, 4], [1, 3, 5]][rank], group, model)


def _failing(rank: int) -> str:
    """Rank 2 meets a batch without labels; nobody waits for it."""
    model, data = tiny_lora(), batches()
    try:
        with fisher_accumulate(model, "safety", group=dist.group.WORLD):
            batch = data[rank] if rank != 2 else data[rank] | {"labels": torch.full_like(data[rank]["labels"], -100)}
            model(**batch).loss.backward()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _failing_evidence(rank: int, fault: str) -> tuple[str, int]:
    """Rank 2 meets a batch without labels, has another adapter, or other losses; what is raised, and how many samples are held."""
    data = batches()[rank]
    off = rank == 2
    found = Evidence.of(tiny_lora(seed=7 if off and fault == "adapter" else 0), "safety", group=dist.group.WORLD)
    if off and fault == "batch":
        data["labels"] = torch.full_like(data["labels"], -100)
    ones = torch.ones(data["labels"].shape)
    try:
        with found.accumulate("gain") as reading:
            reading.backward(data, weights={"other" if off and fault == "losses" else "loss": ones})
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", found.gain.counts.sequences
    return "no error", found.gain.counts.sequences


def _mismatched(rank: int) -> str:
    try:
        accumulate({}, [rank], dist.group.WORLD, tiny_lora(seed=0 if rank < 3 else 7))
    except ValueError as error:
        return str(error)
    return "no error"
