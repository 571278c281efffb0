"""Time and memory of every Fisher structure above a plain forward and backward pass, at small sizes on a CPU.

    python -m bench.structures_cpu [--quick] [--out bench/results/structures_cpu.csv]

One Llama (4 layers of width 256, LoRA on all linear maps), float32; each structure in turn with the plain step (`bench.passes.beside`).
A structure is timed only if feeding a batch whole and feeding it one sequence at a time give the same matrix; `error` is the difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.common import ROOT, Recorder

import torch  # isort: skip
from bench.passes import beside
from bench.shapes import SHAPES
from bench.workload import token_batch
from sst_kernels.fisher import fisher_accumulate, sequence_nll

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("core", "full", {"scope": "global"}),
    ("core", "lowrank", {"scope": "global", "rank": 32}),
    ("core", "diagonal", {"scope": "module"}),
    ("core", "kronecker", {}),
    ("core", "eigen_kronecker", {}),
    ("core", "kronecker_svd", {}),
    ("factor", "diagonal", {}),
    ("factor", "vila", {}),
    ("factor", "kronecker", {}),
    ("factor", "kronecker_lowrank", {"rank": 64}),
    ("factor", "eigen_kronecker", {}),
    ("factor", "lowrank", {"rank": 16}),
]
ALLOWED = 1e-4
SHAPE = SHAPES["llama-4x256"]


def build(rank: int, length: int) -> Any:
    """The model with an adapter "patch" of PEFT's own random weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(SHAPE.config(length, "sdpa")), lora, adapter_name="patch").eval()


def step(model: Any, batch: dict[str, torch.Tensor]) -> None:
    sequence_nll(model, batch).backward()
    model.zero_grad(set_to_none=True)


def accumulate(model: Any, space: str, structure: str, options: dict[str, Any]) -> Any:
    return fisher_accumulate(model, adapter="patch", space=space, structure=structure, reduction="sum", **options)


def disagreement(model: Any, batch: dict, space: str, structure: str, options: dict[str, Any]) -> float:
    """Relative difference on random vectors between one batch and its sequences one at a time, worst block."""
    fishers = []
    singles = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
    for parts in ([batch], singles):
        with accumulate(model, space, structure, options) as run:
            for part in parts:
                step(model, part)
        fishers.append(run.fisher)
    worst = 0.0
    for name, whole in fishers[0].items():
        v = torch.randn(whole.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        a, b = whole.matvec(v), fishers[1][name].matvec(v)
        worst = max(worst, float((a - b).norm() / a.norm()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/structures_cpu.csv")
    parser.add_argument("--quick", action="store_true", help="one small size, three repeats")
    arguments = parser.parse_args()
    sizes = [(8, 4, 32)] if arguments.quick else [(8, 1, 64), (8, 8, 64), (16, 8, 64), (16, 4, 256)]
    arguments.out.unlink(missing_ok=True)
    for rank, batch_size, length in sizes:
        about = {"model": SHAPE.name, "targets": "all-linear", "rank": rank, "batch": batch_size, "length": length}
        record = Recorder(arguments.out, "cpu", **about)
        model, bare, batch = (
            build(rank, length),
            build(rank, length),
            token_batch(SHAPE, batch_size, length, "cpu", seed=1),
        )
        for space, structure, options in CASES:
            if structure == "eigen_kronecker":  # starts from a K-FAC pass
                with accumulate(model, space, "kronecker", {}) as first:
                    step(model, batch)
                options = {"basis": first.fisher}
            error = disagreement(model, batch, space, structure, options)
            if error > ALLOWED:
                record(space, structure, basis="failed", error=error, note="values differ: not timed")
                continue
            run = accumulate(model, space, structure, options)
            turns = {structure: (lambda: step(model, batch), lambda: run)}  # noqa: B023
            rows = beside(lambda: step(bare, batch), turns, "cpu", 3 if arguments.quick else 7)  # noqa: B023
            note = " ".join(f"{k}={v}" for k, v in options.items() if k != "basis")
            record(space, structure, **rows[structure], state_bytes=run.fisher.nbytes, error=error, note=note)


if __name__ == "__main__":
    main()
