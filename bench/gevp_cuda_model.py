"""What a solve on an H100 should take: steps counted on the CPU, by the algorithm and the shapes of a GPU, times two rates.

    python -m bench.gevp_cuda_model [--cases 224x256x16,224x1024x16,...] [--kinds decay,steep]

The number of products and cycles is that of one pencil of `bench.gevp_cuda` per case (seed 1). Bytes and flops follow from them. The rates
are those that comparable kernels reach, the latencies guesses: neither has been measured for these kernels.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from bench.gevp_cuda import TARGETS
from sst_kernels import _native
from sst_kernels.gevp.dense import empty_outputs

CASES = "224x256x16,224x1024x8,224x1024x16,224x1024x32,32x2048x16"
PEAK_BYTES, PEAK_FLOPS = 3.35e12, 60e12  # of the data sheet, for the floor
BYTES, FLOPS = 2.5e12, 30e12  # a second, assumed
LAUNCH, ROUND, SMS = 4e-6, 1e-6, 132  # seconds a launch and a round of Jacobi rotations, assumed; multiprocessors
LAUNCHES_A_STEP, SWEEPS = 27, 8


@dataclass(frozen=True)
class Counted:
    block: int
    basis: int
    keep: int
    cycles: int
    products: int


def pencil(kind: str, n: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """One pencil of the family that `bench.gevp_cuda` times, made on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, n + 1, dtype=torch.float64) ** -TARGETS[kind]
    g, h = (torch.randn(rows, n, dtype=torch.float64, generator=generator) * decay for rows in (n // 4, 2 * n))
    a, b = (rows.mT @ rows / len(rows) for rows in (g, h))
    b.diagonal().add_(1e-4)
    return (a + a.mT) / 2, (b + b.mT) / 2


def count(a: torch.Tensor, b: torch.Tensor, k: int) -> Counted:
    """Products and cycles of the GPU's shapes, on the CPU."""
    n, native = len(a), _native.cpu()
    options, outputs = native.Options.for_problem(n, k, True), empty_outputs((1,), n, k, a.device)
    size = native.workspace_bytes(1, n, options, False, 1)
    memory = torch.empty(size, dtype=torch.uint8)
    where = (a.data_ptr(), n * n, b.data_ptr(), n * n, False, 1, n)
    native.solve_dense(*where, options, *(x.data_ptr() for x in outputs), memory.data_ptr(), size, 1)
    if int(outputs[3]) != 0:
        raise RuntimeError(f"order {n}, k = {k}: status {int(outputs[3])} instead of converged")
    cycles = int(outputs[4])
    products = (options.basis + (cycles - 1) * (options.basis - options.keep)) // options.block
    return Counted(options.block, options.basis, options.keep, cycles, products)


def seconds(batch: int, n: int, c: Counted) -> dict[str, float]:
    """Each stage by its bytes or flops, whichever takes longer, and its launches."""
    matrix, column = 8.0 * batch * n * n, 8.0 * batch * n
    width = (c.basis + c.keep) / 2  # of the basis, on average
    waves = -(-batch // SMS)
    return {
        "screen": 2 * matrix / BYTES,
        "copy, factor": 2 * matrix / BYTES + 0.78 * batch * n**3 / FLOPS + 3 * n / 64 * LAUNCH,
        "products": c.products * max(2 * matrix / BYTES, 4 * batch * n * n * c.block / FLOPS),
        "orthonormalise": c.products * (column * (4 * width + 20 * c.block) / BYTES + LAUNCHES_A_STEP * LAUNCH)
        + 2 * c.products * waves * SWEEPS * (c.block - 1) * ROUND,
        "Ritz, restart": c.cycles
        * (2 * column * (c.basis + 2 * c.keep) / BYTES + waves * SWEEPS * (c.basis - 1) * ROUND),
        "floor": 2 * matrix / PEAK_BYTES + batch * n**3 / 3 / PEAK_FLOPS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=CASES, help="batch x n x k, comma-separated")
    parser.add_argument("--kinds", default="decay,steep", help=f"of {', '.join(TARGETS)}")
    options = parser.parse_args()
    print(
        f"{BYTES / 1e12:.1f} TB/s, {FLOPS / 1e12:.0f} Tflop/s; {LAUNCH * 1e6:.0f} us a launch, {ROUND * 1e6:.0f} us a round\n"
    )
    for index, (case, kind) in enumerate((c, x) for c in options.cases.split(",") for x in options.kinds.split(",")):
        batch, n, k = (int(part) for part in case.split("x"))
        counted = count(*pencil(kind, n), k)
        stages = {name: 1e3 * x for name, x in seconds(batch, n, counted).items()}
        floor = stages.pop("floor")
        if index == 0:
            print(f"| case | block, basis, keep | products, cycles | {' | '.join(stages)} | sum | floor |")
            print("| --- |" + " --- |" * (len(stages) + 4))
        shape = f"{counted.block}, {counted.basis}, {counted.keep} | {counted.products}, {counted.cycles}"
        cells = " | ".join(f"{x:.1f}" for x in (*stages.values(), sum(stages.values()), floor))
        print(f"| [{batch}, {n}], k = {k}, {kind} | {shape} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
