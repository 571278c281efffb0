"""How cost grows: one quantity at a time in N, T, r, d, modules and k, a power law fitted to each.

`python -m bench.scaling` writes bench/results/scaling_<device>.csv; `exponent` is the least-squares slope of log ms over log x.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.common import ROOT, Recorder, measure

import torch  # isort: skip
from sst_kernels import ops
from sst_kernels.gevp import LowRank, gevp

BASE = {"N": 8, "T": 64, "r": 16, "d": 1024, "modules": 28, "k": 16}
GRID = {
    "core_outer": {"N": (4, 8, 16, 32), "T": (32, 64, 128, 256), "r": (8, 16, 32, 64), "modules": (14, 28, 56, 112)},
    "factor_moments": {"N": (4, 8, 16, 32), "T": (32, 64, 128, 256), "r": (8, 16, 32, 64), "d": (512, 1024, 2048, 4096)},
    "gram": {"T": (32, 64, 128, 256), "d": (256, 512, 1024, 2048)},
    "sketch": {"T": (32, 64, 128, 256), "d": (512, 1024, 2048, 4096)},
    "gevp low-rank": {"N": (32, 64, 128, 256), "modules": (14, 28, 56, 112), "r": (8, 16, 32), "k": (4, 8, 16, 32)},
    "gevp dense": {"modules": (2, 4, 8, 16), "r": (6, 8, 12, 16), "k": (4, 8, 16, 32)},
}  # fmt: skip
# What the arithmetic says each should approach for large x.
EXPECTED = {
    ("core_outer", "N"): 1, ("core_outer", "T"): 1, ("core_outer", "r"): 2, ("core_outer", "modules"): 1,
    ("factor_moments", "N"): 1, ("factor_moments", "T"): 1, ("factor_moments", "r"): 1, ("factor_moments", "d"): 1,
    ("gram", "T"): 1, ("gram", "d"): 2, ("sketch", "T"): 1, ("sketch", "d"): 1,
    ("gevp low-rank", "N"): 2, ("gevp low-rank", "modules"): 1, ("gevp low-rank", "r"): 2, ("gevp low-rank", "k"): 0,
    ("gevp dense", "modules"): 1, ("gevp dense", "r"): 6, ("gevp dense", "k"): 0,
}  # fmt: skip


def workload(op: str, sizes: dict[str, int], device: str) -> Callable[[], Any]:
    """One call of `op` at `sizes`."""
    samples, length, r, d = sizes["N"], sizes["T"], sizes["r"], sizes["d"]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator, dtype=dtype)

    if op == "gevp low-rank":
        n = sizes["modules"] * r * r
        a, b = LowRank(draw(samples, n)), LowRank(draw(samples, n), 0.1)
        return lambda: gevp(a, b, min(sizes["k"], samples))
    if op == "gevp dense":
        n = r * r
        x = draw(2, sizes["modules"], n, 2 * n, dtype=torch.float64)
        a, b = x @ x.mT / n
        return lambda: gevp(a, b, min(sizes["k"], n), damping=0.1)
    tokens = samples * length
    spans = ops.spans_from_lengths(samples, length, None, device=device)
    scale = torch.ones(samples, device=device)
    left, right, wide = draw(tokens, r), draw(tokens, r), draw(tokens, d)
    if op == "core_outer":
        modules = sizes["modules"]
        out = torch.empty(samples, modules * r * r, device=device)
        return lambda: ops.core_outer([left] * modules, [right] * modules, spans, scale, out)
    if op == "factor_moments":
        out = torch.zeros(r, d, device=device)
        return lambda: ops.factor_moments(left, wide, spans, scale, None, out)
    if op == "gram":
        out = torch.zeros(d, d, device=device)
        return lambda: ops.gram(wide, spans, scale, out)
    omega = torch.sign(draw(d, 64))
    out = torch.zeros(d, 64, device=device)
    return lambda: ops.sketch(wide, omega, spans, scale, out)


def exponent(points: Iterable[tuple[float, float]]) -> float:
    """Least-squares slope of log y over log x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mx, my = (sum(values) / len(logs) for values in zip(*logs))
    return sum((x - mx) * (y - my) for x, y in logs) / sum((x - mx) ** 2 for x, _ in logs)


def main(arguments: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / f"scaling_{device}.csv")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ops", nargs="+", choices=GRID, default=list(GRID))
    options = parser.parse_args(arguments)
    record = Recorder(options.out, device, model="scaling")
    for op in options.ops:
        for name, values in GRID[op].items():
            points = []
            for value in values:
                sizes = BASE | ({"N": 64} if op == "gevp low-rank" else {"modules": 4} if op == "gevp dense" else {})
                run = workload(op, sizes | {name: value}, device)
                points.append((value, measure(run, device, repeats=options.repeats, warmup=1)))
            slope = exponent((x, max(min(m.times), 1e-6)) for x, m in points)
            for value, measured in points:
                record(
                    op, f"{name}={value}", measured,
                    ratio=slope, note=f"ms ~ {name}^{slope:.2f}, arithmetic says {EXPECTED[op, name]}",
                )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
