"""From Fishers to an adapter on disk, and what the SVD family and K-FAC need for the same modules."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sst_kernels as sst
from bench import baselines, gates
from bench.common import Ceilings, Measured, Recorder, free, measure
from bench.shapes import Shape
from bench.workload import build_model, core_fisher, random_adapter
from sst_merge.io.adapters import Adapter, write_adapter
from sst_merge.merge.algebra import concatenate, transform

Tasks = list[tuple[Tensor, Tensor]]


def sst_stages(
    shape: Shape, record: Recorder, ceilings64: Ceilings, *, rank: int, targets: str, samples: int, device: str, scope: str,
    repeats: int = 5,
) -> float:  # fmt: skip
    """GEVP, filter and export of SST-Merge in core space; returns the total median ms."""
    safety, task = (random_adapter(shape, rank, targets, device="cpu", seed=seed) for seed in (0, 1))
    gain, cost = (core_fisher(safety, samples, device=device, seed=seed) for seed in (1, 2))
    error = gates.solve_gate(gain, cost, scope)
    solve = partial(sst.subspace, gain, cost, scope=scope)
    space, n, modules = solve(), rank**2 * len(gain.blocks), len(gain.blocks)
    count = modules if scope == "module" else 1
    note = f"{count} pencil(s) of order {n // count}, {samples}+{samples} rows"
    about = {"rank": rank, "targets": targets, "batch": samples, "note": note}
    # One solve in the space of the rows: its QR where that is smaller, and the eigenproblems there.
    width = min(2 * samples, n // count)
    flops = 2.0 * (2 * samples) ** 2 * n if width < n // count else 0.0
    flops += 12.0 * width * samples**2 if scope == "global" else 14.0 * count * width**3
    floor = {"flops": flops, "floor_ms": ceilings64.floor_ms(flops=flops)}
    solved = measure(solve, device, repeats=repeats)
    record("gevp", f"{scope}, subspace() with 4 held-out folds", solved, **about, **floor, error=error)
    isotropic = measure(partial(solve, metric="frobenius"), device, repeats=repeats)
    record("gevp", f"{scope}, subspace(metric='frobenius')", isotropic, **about)
    budget = space.soft(mu=float(space.values[len(space.values) // 4])).prediction.cost_per_label
    chosen = measure(lambda: space.soft(kl_budget=budget), device, repeats=repeats)
    record("filter", f"{scope}, soft(kl_budget), next time", chosen, **about)
    both = measure(lambda: solve().soft(kl_budget=budget), device, repeats=repeats)
    record("filter", f"{scope}, subspace() + soft(kl_budget)", both, **about)
    patch = space.soft(kl_budget=budget)
    with tempfile.TemporaryDirectory() as folder:
        written = measure(partial(export, task, safety, patch, Path(folder)), "cpu", repeats=repeats)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    record("export", f"{scope}, transform + concatenate + write", written, **about, bytes=size)
    total = both.median + written.median
    record("merge", f"SST-Merge {scope}: subspace + filter + export", **about, ms=total, basis="sum of measured")
    free(device)
    return total


def export(task: Adapter, safety: Adapter, patch: sst.Patch, folder: Path) -> None:
    write_adapter(concatenate([(1.0, task), (1.0, transform(safety, patch.coordinates))]), folder)


@dataclass(frozen=True)
class Merges:
    """What others need for the modules of a model, one method a group of rows."""

    shape: Shape
    record: Recorder
    rank: int
    targets: str
    device: str

    def peft(self, *methods: str) -> None:
        """PEFT's `add_weighted_adapter` with its defaults, once per distinct module shape, times the number of such modules; the
        methods without an SVD merge A and B separately, which is not the merge of ΔW."""
        names = {size: name.split(".")[1] for name, size in reversed(self.shape.linears(self.targets).items())}
        about = {"rank": self.rank, "device": self.device, "dtype": torch.float32, "adapters": ("one", "two")}

        def once(method: str, size: tuple[int, int]) -> Measured:
            model = build_model(self.shape.with_layers(1), modules=(names[size],), **about)
            options = {"combination_type": method, "density": 0.5}
            merge = partial(model.base_model.add_weighted_adapter, ["one", "two"], [1.0, 0.5], "merged", **options)
            return self._once(merge)

        for method in methods:
            self._by_size(f"PEFT {method}", self._sizes(), partial(once, method))

    def factored(self) -> None:
        """The efficient peers over all modules of a model, module by module and stacked by shape; export is not in them."""
        error = gates.baseline_gate(self.device)
        groups = [tasks(size, count, self.rank, self.device) for size, count in Counter(self._sizes()).items()]
        singles = [[(B[i], A[i]) for B, A in group] for group in groups for i in range(len(group[0][0]))]
        for name, method in baselines.FACTORED.items():
            for style, modules in (("module by module", singles), ("stacked by shape", groups)):
                run = lambda method=method, modules=modules: [method(module) for module in modules]  # noqa: E731
                self._row(f"{name}, {style}", measure(run, self.device, repeats=3, seconds=4), error=error)

    def dense(self) -> None:
        """TSV-Merge, Subspace Boosting and DARE on ΔW, once per distinct shape, times the number of modules."""
        for name, method in baselines.DENSE.items():

            def once(size: tuple[int, int], method: Callable[[Tasks], Tensor] = method) -> Measured:
                pair = [(B[0], A[0]) for B, A in tasks(size, 1, self.rank, self.device)]
                return self._once(lambda: method(pair))

            self._by_size(name, self._sizes(), once)

    def kfac(self) -> None:
        """What dense Kronecker pencils cost: one float32 generalized eigenproblem per wide factor (torch eigh after Cholesky)."""

        def once(d: int) -> Measured:
            a, b = (_factor(d, self.device, seed) for seed in (0, 1))
            return self._once(lambda: _dense_pencil(a, b))

        sides = [d for size in self._sizes() for d in size]
        self._by_size("dense K-FAC pencils (torch)", sides, once, state_bytes=2 * self.shape.kfac_bytes(self.targets))

    def _sizes(self) -> list[tuple[int, int]]:
        return list(self.shape.modules(self.targets).values())

    def _once(self, run: Callable[[], Any]) -> Measured:
        return measure(run, self.device, repeats=1, warmup=0)

    def _row(self, name: str, measured: Measured | None = None, **columns: Any) -> None:
        self.record("merge", name, measured, rank=self.rank, targets=self.targets, **columns)
        free(self.device)

    def _by_size(self, name: str, sizes: list[Any], once: Callable[[Any], Measured], **columns: Any) -> None:
        """A row of the sum over `sizes` of what `once` measures for each distinct one."""
        total, peaks, parts = 0.0, [], []
        for size, count in Counter(sizes).items():
            measured = once(size)
            total += measured.median * count
            peaks.append(measured.peak_mib or 0.0)
            said = "x".join(map(str, size)) if isinstance(size, tuple) else size
            parts.append(f"{said}: {measured.median:.3g} ms x {count}")
            free(self.device)
        note = "; ".join(parts)
        self._row(name, ms=total, basis="scaled", peak_mib=max(peaks) or None, note=note, **columns)


def _dense_pencil(a: Tensor, b: Tensor) -> Any:
    factor = torch.linalg.cholesky(b)
    half = torch.linalg.solve_triangular(factor, a, upper=False)
    return torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))


def _factor(d: int, device: str, seed: int) -> Tensor:
    x = torch.randn(d + 8, d, device=device, generator=torch.Generator(device).manual_seed(seed))
    return x.mT @ x / len(x) + 0.1 * torch.eye(d, device=device)


def tasks(size: tuple[int, int], count: int, rank: int, device: str) -> Tasks:
    """Two random adapters of `count` modules of (d_out, d_in)."""
    p, q = size
    return [(torch.randn(count, p, rank, device=device), torch.randn(count, rank, q, device=device)) for _ in range(2)]
