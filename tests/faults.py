"""Passes of the tiny model in child processes that are killed, terminated or run out of disk at chosen points.

Children come from a fork server that has imported torch already, so that a fault costs tenths of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from sst_kernels import fisher_accumulate, sequence_nll
from sst_kernels.fisher import Checkpoints, item_seed, storage
from tests.models import tiny_batch, tiny_lora

BATCHES = 12
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "fold": {"scope": "module"},
    "lowrank": {"structure": "lowrank", "rank": 4},
    "diagonal": {"structure": "diagonal", "centred": True},
    "kronecker": {"structure": "kronecker", "space": "factor"},
    "kronecker_lowrank": {"structure": "kronecker_lowrank", "space": "factor", "rank": 8},
    "kronecker_svd": {"structure": "kronecker_svd"},
    "vila": {"structure": "vila", "space": "factor"},
}
# Where in the k-th write of a checkpoint SIGKILL strikes.
STAGES = ("before", "half written", "not synced", "not renamed", "renamed")
KINDS = ("sigkill", "sigterm", "disk full", *(f"write: {stage}" for stage in STAGES))


def run(folder: Path, case: str) -> None:
    """The pass, resumed where a checkpoint stands; leaves result.safetensors. Labels are drawn per batch."""
    model = tiny_lora()
    path = folder / "pass.checkpoint"
    with (
        fisher_accumulate(model, "safety", resume=path if path.exists() else None, **CASES[case]) as pass_,
        Checkpoints(pass_, path, every=1) as keep,
    ):
        for i in keep.remaining(range(BATCHES)):
            generator = torch.Generator().manual_seed(item_seed(0, i))
            sequence_nll(model, tiny_batch(2, seed=i), "mc", generator=generator).backward()
    pass_.save(folder / "result.safetensors")
    keep.remove()


def child(folder: str, case: str, kind: str, point: float) -> None:
    """`run`, with a fault installed; `point` in [0, 1] says where."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
    if kind == "disk full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails with EFBIG instead
        limit = int(2000 + point * 20000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    elif kind.startswith("write: "):
        _die_in_write(int(point * BATCHES), kind.removeprefix("write: "))
    run(Path(folder), case)


def _die_in_write(at: int, stage: str) -> None:
    writes, save, sync, replace = iter(range(1000)), storage.save_file, os.fsync, os.replace
    state = {"now": False}

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def saving(tensors: Any, path: Any, metadata: Any) -> None:
        state["now"] = next(writes) == at
        if state["now"] and stage == "before":
            die()
        save(tensors, path, metadata)
        if state["now"] and stage == "half written":
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def syncing(descriptor: int) -> None:
        if state["now"] and stage == "not synced":
            die()
        sync(descriptor)

    def replacing(source: Any, target: Any) -> None:
        if state["now"] and stage == "not renamed":
            die()
        replace(source, target)
        if state["now"] and stage == "renamed":
            die()

    storage.save_file, os.fsync, os.replace = saving, syncing, replacing


def context() -> Any:
    """The fork server: one import of torch and transformers for all children."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.faults"])
    return server


def inject(folder: Path, case: str, kind: str, point: float, seconds: float) -> int | None:
    """Run the pass in a child with one fault; `seconds` is how long an undisturbed child takes. Returns its exit code."""
    process = context().Process(target=child, args=(str(folder), case, kind, point))
    process.start()
    if kind in ("sigkill", "sigterm"):
        time.sleep(point * seconds)
        process.kill() if kind == "sigkill" else process.terminate()  # nothing happens to one that has finished
    process.join(120)
    return process.exitcode


def scenario(folder: Path, seed: int, seconds: float) -> tuple[str, list[tuple[str, float, int | None]]]:
    """One case and up to three faults in a row at random points; then the pass is resumed in peace."""
    draw = random.Random(seed)
    case, faults = draw.choice(list(CASES)), []
    for _ in range(draw.randint(1, 3)):
        kind, point = KINDS[(seed + len(faults)) % len(KINDS)], draw.random()
        faults.append((kind, round(point, 3), inject(folder, case, kind, point, seconds)))
    for left in folder.glob("*result.safetensors*"):  # of a run that outlived its fault, or was killed while it saved
        left.unlink()
    code = inject(folder, case, "none", 0.0, seconds)
    assert code == 0, (seed, case, faults, code)
    return case, faults
