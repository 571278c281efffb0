"""Time and memory of every Fisher structure above a plain forward and backward pass, at small sizes on a CPU.

    python -m bench.structures_cpu [--quick] [--out bench/results/structures_cpu.csv]

One Llama (4 layers of width 256, LoRA on all linear maps), float32; each structure in turn with the plain step, after the gate.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.common import ROOT, Recorder, measure_ceilings

import torch  # isort: skip
from bench.gates import fisher_gate
from bench.passes import Setting, fisher_passes
from bench.shapes import SHAPES
from bench.workload import STRUCTURES

SHAPE = SHAPES["llama-4x256"]


def build(rank: int, length: int) -> Any:
    """The model that `bench.peers_cpu` gives to every library: an adapter "patch" of PEFT's own random weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(SHAPE.config(length, "sdpa")), lora, adapter_name="patch").eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/structures_cpu.csv")
    parser.add_argument("--quick", action="store_true", help="one small size, three repeats")
    arguments = parser.parse_args()
    sizes = [(8, 4, 32)] if arguments.quick else [(8, 1, 64), (8, 8, 64), (16, 8, 64), (16, 4, 256)]
    arguments.out.unlink(missing_ok=True)
    record = Recorder(arguments.out, "cpu", model=SHAPE.name, error=fisher_gate("cpu"))
    ceilings = measure_ceilings("cpu", torch.float32, record)
    for rank, batch, length in sizes:
        at = Setting(SHAPE, rank, "all-linear", batch, length, "cpu", torch.float32, 3 if arguments.quick else 7)
        fisher_passes(at, record, ceilings, STRUCTURES)


if __name__ == "__main__":
    main()
