"""What the Triton kernels should take on an H100, before one has run them: floors, launches, occupancy, predicted times.

    python -m bench.machine     writes bench/results/machine.csv and docs/machine.md; compiles for sm_90, needs no GPU

Launches are those of the launchers, whose kernels are compiled but not run; registers and shared memory are the compiler's. `bench.ops`
prints the prediction beside what it measures.
"""

from __future__ import annotations

import csv
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from bench.common import ROOT
from bench.ops import CASES, Case, Draw, sizes

import torch  # isort: skip
from torch import Tensor

BYTES, FLOPS, LAUNCH = 3.0e12, 620e12, 2.5e-6  # a second, a second in bf16 products, seconds between launches: assumed
SM, SMS, REGISTERS, SHARED, WARPS, CTAS = 90, 132, 65536, 228 << 10, 64, 32
COLUMNS = (
    *("op", "width", "batch", "length", "rank", "bytes", "flops", "floor_ms", "launches", "kernel", "ctas", "warps"),
    *("registers", "shared_bytes", "ctas_per_sm", "waves", "predicted_ms"),
)
POINTER = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.float64: "*fp64",
}  # fmt: skip
CSV, PAGE = ROOT / "bench/results/machine.csv", ROOT / "docs/machine.md"
HEAD = """# What the kernels should take

Written by `python -m bench.machine`: the quick sizes of `bench.ops` on an H100, bfloat16, before any measurement. Launches, CTAs,
registers and shared memory are those of the launchers and of the compiler for sm_90. The floor is the larger of bytes at 3.0 TB/s and
operations at 620 Tflop/s. In the prediction the processor with the most CTAs is waited for, and each launch takes 2.5 µs more; the three
rates are assumed, and nothing is taken off for too few warps, latency or instructions. `bench.ops` on a GPU states the
prediction beside its measurement.

| op | size | floor µs | launches | largest kernel | CTAs, warps | registers, shared KiB | CTAs a processor, waves | predicted µs |
| --- | --- | ---: | ---: | --- | --- | --- | --- | ---: |
"""


def launched(case: Case) -> list[tuple[Any, tuple[int, ...], tuple, dict[str, Any]]]:
    """(kernel, grid, arguments, options) of every launch that the op of `case` makes; no kernel runs."""
    op, found = case.op.split(" ")[0], []
    forms = {name: importlib.import_module(f"sst_kernels.ops.{name}.op") for name in CASES}
    kernels = {name: importlib.import_module(f"sst_kernels.ops.{name}.kernel") for name in CASES}
    tiles = importlib.import_module("sst_kernels.ops.tiles")

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.append((kernel, grid, args, options))

    patches = [mock.patch.object(m, "launch", launch) for m in (tiles, *kernels.values()) if hasattr(m, "launch")]
    patches += [mock.patch.object(form, f"_{name}", getattr(kernels[name], name)) for name, form in forms.items()]
    for patch in patches:
        patch.start()
    try:
        case.call(*case.inputs, *case.state)
    finally:
        for patch in patches:
            patch.stop()
    if not found:
        raise RuntimeError(f"{op} launched nothing")
    return found


def compiled(kernel: Any, args: tuple, options: dict[str, Any]) -> dict[str, int]:
    """Registers and bytes of shared memory of a launch, compiled for `SM` with what Triton would specialise on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {k: v for k, v in options.items() if k in kernel.arg_names}
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        value = constants.get(name) if name in constants else args[i]
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = POINTER[value.dtype] if isinstance(value, Tensor) else "i32"
        if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    how = {k: v for k, v in options.items() if k in ("num_warps", "num_stages", "maxnreg")}
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", SM, 32), options=how | {"enable_fp_fusion": True})
    return {"registers": resources(binary.asm["cubin"])["registers"], "shared_bytes": binary.metadata.shared}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes of a kernel, as cuobjdump reads them from the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"]), "local": int(usage["LOCAL"])}


def resident(registers: int, shared: int, warps: int) -> int:
    """CTAs that one multiprocessor holds: registers in steps of 8 a thread, and 1 KiB of shared memory that each CTA costs."""
    return min(REGISTERS // (-(-registers // 8) * 8 * 32 * warps), SHARED // (shared + 1024), WARPS // warps, CTAS)


def predicted_ms(floor_ms: float, ctas: int, launches: int) -> float:
    """The floor, where the processor with the most CTAs is waited for, and the launches."""
    return floor_ms * -(-ctas // SMS) * SMS / ctas + 1e3 * LAUNCH * launches


def rows() -> Iterator[dict[str, Any]]:
    """A row for every op and quick size."""
    for op, make in CASES.items():
        for size in sizes(op, "cuda", 224, True):
            for case in make(Draw(size, "cpu", torch.bfloat16)):
                found = launched(case)
                floor = 1e3 * max(case.bytes / BYTES, case.flops / FLOPS)
                kernel, grid, args, options = max(
                    found, key=lambda launch: _product(launch[1]) * launch[3]["num_warps"]
                )
                ctas, warps, used = _product(grid), options["num_warps"], compiled(kernel, args, options)
                per_sm = resident(used["registers"], used["shared_bytes"], warps)
                waves = ctas / (per_sm * SMS)
                yield {
                    "op": case.op, "width": case.width, "batch": size.B, "length": size.T, "rank": size.r, "bytes": case.bytes,
                    "flops": case.flops, "floor_ms": floor, "launches": len(found), "kernel": kernel.fn.__name__, "ctas": ctas,
                    "warps": warps, **used, "ctas_per_sm": per_sm, "waves": waves,
                    "predicted_ms": predicted_ms(floor, ctas, len(found)),
                }  # fmt: skip


def _product(grid: tuple[int, ...]) -> int:
    return int(torch.Size(grid).numel())


def page(table: list[dict[str, Any]]) -> str:
    """docs/machine.md of the rows of the CSV file."""
    lines = []
    for r in table:
        size = f"{r['batch']} x {r['length']}, r = {r['rank']}, {r['width']}"
        held = f"{r['registers']}, {int(r['shared_bytes']) / 1024:.0f}"
        lines.append(
            f"| `{r['op']}` | {size} | {1e3 * float(r['floor_ms']):.1f} | {r['launches']} | `{r['kernel']}` | {r['ctas']}, {r['warps']} | {held}"
            f" | {r['ctas_per_sm']}, {float(r['waves']):.2f} | {1e3 * float(r['predicted_ms']):.1f} |"
        )
    return HEAD + "\n".join(lines) + "\n"


@cache
def _table() -> list[dict[str, str]]:
    with CSV.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def prediction(op: str, width: str, batch: int, length: int, rank: int) -> str:
    """What a row of `bench.ops` says of it, "" for a size that is not in the table."""
    key = (op, width, str(batch), str(length), str(rank))
    found = [r for r in _table() if tuple(r[c] for c in ("op", "width", "batch", "length", "rank")) == key]
    return f"predicted {1e3 * float(found[0]['predicted_ms']):.1f} us on an H100" if found else ""


def main() -> None:
    with CSV.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows():
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
            print(row["op"], row["width"], row["kernel"], f"{1e3 * row['predicted_ms']:.1f} us", flush=True)
    PAGE.write_text(page(_table()), encoding="utf-8")


if __name__ == "__main__":
    main()
