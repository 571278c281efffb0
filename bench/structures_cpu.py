"""Time and memory of every Fisher structure above a plain forward and backward pass, at small sizes on a CPU.

    python bench/structures_cpu.py [--quick] [--out bench/results/structures_cpu.csv]

One Llama (4 layers of width 256, LoRA on all linear maps), float32. `ratio` is the median over pairs of steps taken in turn,
one observed and one of an unobserved copy of the model, so that a busy machine slows both; `peak_mib` is the most memory held
above the start of a step, by the allocator's own record, minus the same of the unobserved step. A structure is timed only if
feeding a batch whole and feeding it one sequence at a time give the same matrix; `error` is the difference.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.common import ROOT, Measured, Recorder, measure, peak_mib
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


def build(rank: int, length: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=length,
    )
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora, adapter_name="patch").eval()


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 1024, (batch, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : length // 4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(model: Any, batch: dict[str, torch.Tensor]) -> None:
    sequence_nll(model, batch).backward()
    model.zero_grad(set_to_none=True)


def accumulate(model: Any, space: str, structure: str, options: dict[str, Any]) -> Any:
    return fisher_accumulate(model, adapter="patch", space=space, structure=structure, reduction="sum", **options)


def with_basis(model: Any, batch: dict, space: str, structure: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with the K-FAC pass that EK-FAC starts from."""
    if structure != "eigen_kronecker":
        return options
    with accumulate(model, space, "kronecker", {}) as first:
        step(model, batch)
    return {**options, "basis": first.fisher}


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


def in_turn(observed: Callable[[], Any], plain: Callable[[], Any], repeats: int) -> tuple[Measured, Measured]:
    """The two measured step by step in turn, after two steps of warm-up each, with the peak of a further step."""
    taken: list[tuple[float, float]] = []
    for i in range(repeats + 2):
        pair = tuple(measure(run, "cpu", repeats=1, warmup=0).median for run in (observed, plain))
        if i >= 2:
            taken.append(pair)
    times = zip(*taken, strict=True)
    return tuple(Measured(list(t), peak_mib(run)) for t, run in zip(times, (observed, plain), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/structures_cpu.csv")
    parser.add_argument("--quick", action="store_true", help="one small size, three repeats")
    arguments = parser.parse_args()
    sizes = [(8, 4, 32)] if arguments.quick else [(8, 1, 64), (8, 8, 64), (16, 8, 64), (16, 4, 256)]
    repeats = 3 if arguments.quick else 7
    arguments.out.unlink(missing_ok=True)
    for rank, batch_size, length in sizes:
        record = Recorder(
            arguments.out, "cpu", model="llama-4x256", targets="all-linear", rank=rank, batch=batch_size, length=length
        )
        model, bare, batch = build(rank, length), build(rank, length), tokens(batch_size, length)
        for space, structure, options in CASES:
            options = with_basis(model, batch, space, structure, options)
            error = disagreement(model, batch, space, structure, options)
            if error > ALLOWED:
                record(space, structure, error=error, note="values differ: not timed")
                continue
            with accumulate(model, space, structure, options) as run:
                taken, plain = in_turn(lambda: step(model, batch), lambda: step(bare, batch), repeats)  # noqa: B023
            record(
                space,
                structure,
                Measured(taken.times, taken.peak_mib - plain.peak_mib),
                ratio=statistics.median(a / b for a, b in zip(taken.times, plain.times, strict=True)),
                state_bytes=run.fisher.nbytes,
                error=error,
                note=" ".join(f"{k}={v}" for k, v in options.items() if k != "basis"),
            )


if __name__ == "__main__":
    main()
