"""Reductions over links of a known rate, beside what docs/scaling.md says of them.

`python -m bench.communication` (root, Linux) writes bench/results/communication_cpu.csv. Every rank is a process (gloo) in a network
namespace of its own with one link to a bridge, held to `RATE` in each direction; bytes are what the links' counters say. States are a
hundredth of a 7B model's, and the links a thousandth of 25 GB/s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.common import ROOT, Measured, Recorder

import torch  # isort: skip
import torch.distributed as dist

from sst_kernels.distributed import reduce_over_ranks
from sst_kernels.fisher import Counts, Structure, make_structure

RATE = 25_000_000  # bytes a second
COORDINATES, ROWS, REPEATS = 57_344, 96, 3


def rows_of(kind: str, ranks: int, **options: Any) -> list[Structure]:
    structure: Any = make_structure(kind, (COORDINATES, 1), **options)
    structure.append(torch.ones(ROWS // ranks, COORDINATES))
    structure.counts += Counts(ROWS // ranks)
    return [structure]


def folded(_ranks: int) -> list[Structure]:
    """40 modules of rank 16, 20 MiB."""
    made: list[Any] = [make_structure("full", (16, 16), rows="fold") for _ in range(40)]
    for structure in made:
        structure.append(torch.ones(300, 256))
    return made


# name: the structures of one rank, and whether they are rows that all ranks bring (else sums of the state)
CASES: dict[str, tuple[Callable[[int], list[Structure]], bool]] = {
    "full, rows": (partial(rows_of, "full"), True),
    "lowrank, rows": (partial(rows_of, "lowrank", rank=ROWS // 2), True),
    "full, module scope": (folded, False),
    "diagonal, factor space": (lambda _: [make_structure("diagonal", (2048, 2560))], False),
    "kronecker": (lambda _: [make_structure("kronecker", (16, 2296))], False),
}


def predicted(state: int, ranks: int, gathers: bool) -> tuple[float, float]:
    """Bytes through each link in each direction, and seconds: a ring all-reduce of the state, or one broadcast per rank,
    which gloo sends down a tree, whole messages at a time."""
    if gathers:
        return state * (ranks - 1) / ranks, state * math.ceil(math.log2(ranks)) / RATE
    through = 2 * state * (ranks - 1) / ranks
    return through, through / RATE


def on_rank(rank: int, ranks: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    for name, (make, gathers) in CASES.items():
        times, most = [], 0
        for _ in range(1 + REPEATS):
            structures = make(ranks)
            state = sum(s.nbytes for s in structures) * (ranks if gathers else 1)
            dist.barrier()
            before, start = _counters(), time.monotonic()
            reduce_over_ranks([r for s in structures for r in (s.reduction(), s.count_reduction())])
            dist.barrier()
            times.append(time.monotonic() - start)
            most = max(after - b for after, b in zip(_counters(), before))
        busiest = torch.tensor([most])
        dist.all_reduce(busiest, op=dist.ReduceOp.MAX)
        if rank == 0:
            fact = {"name": name, "times": times[1:], "bytes": int(busiest), "state": state, "gathers": gathers}
            print(json.dumps(fact), flush=True)
    dist.destroy_process_group()


def _counters() -> tuple[int, int]:
    """Bytes sent and received by this namespace's link."""
    folder = Path("/sys/class/net/eth0/statistics")
    return int((folder / "tx_bytes").read_text()), int((folder / "rx_bytes").read_text())


@contextmanager
def network(ranks: int) -> Iterator[list[str]]:
    """Names of one namespace a rank, each with eth0 at 10.77.0.<rank + 1>; all are gone in the end."""
    hub, *names = made = [f"sst{os.getpid()}-{i}" for i in ("hub", *range(ranks))]
    with ExitStack() as stack:
        for name in made:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for i, name in enumerate(names):
            _ip("-n", hub, "link", "add", f"link{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", hub, "link", "set", f"link{i}", "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            for where, device in ((hub, f"link{i}"), (name, "eth0")):
                shape = ("rate", f"{RATE * 8}bit", "burst", "64kb", "limit", "512kb")
                subprocess.run(["tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf", *shape], check=True)
        yield names


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def run(ranks: int, record: Recorder) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "bench.communication", "--ranks", str(ranks), "--rank"]
    with network(ranks) as names:
        children = [
            subprocess.Popen(["ip", "netns", "exec", name, *call, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
            for i, name in enumerate(names)
        ]  # fmt: skip
        told = [child.communicate(timeout=600)[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError(f"ranks ended with {[child.returncode for child in children]}")
    for fact in map(json.loads, told[0].splitlines()):
        through, seconds = predicted(fact["state"], ranks, fact["gathers"])
        measured, model_ms = Measured([1000 * t for t in fact["times"]]), 1000 * seconds
        share = fact["bytes"] / through
        record(
            "reduce", fact["name"], measured, model=f"{ranks} ranks", state_bytes=fact["state"], bytes=fact["bytes"],
            floor_ms=model_ms, ratio=measured.median / model_ms,
            note=f"links of {RATE / 1e6:g} MB/s; model {through:.0f} bytes a link, measured {share:.3f} of it",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "communication_cpu.csv")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    asked = parser.parse_args()
    if asked.rank is not None:
        on_rank(asked.rank, asked.ranks[0], "tcp://10.77.0.1:29500")
        return
    asked.out.unlink(missing_ok=True)
    record = Recorder(asked.out, "cpu")
    for ranks in asked.ranks:
        run(ranks, record)


if __name__ == "__main__":
    main()
