"""From Fishers to an adapter on disk, and what the SVD family and K-FAC need for the same modules."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sst_kernels as sst
from bench import baselines, gates
from bench.common import Ceilings, Measured, Recorder, free, measure
from bench.shapes import Shape
from bench.workload import build_model, core_fisher, random_adapter
from sst_merge.adapters import Adapter, write_adapter
from sst_merge.algebra import concatenate, transform


def sst_stages(
    shape: Shape,
    record: Recorder,
    ceilings64: Ceilings,
    *,
    rank: int,
    targets: str,
    samples: int,
    device: str,
    scopes: tuple[str, ...] = ("global", "module"),
    repeats: int = 5,
) -> dict[str, float]:
    """GEVP, filter and export of SST-Merge in core space; returns the total median ms per scope."""
    adapter = random_adapter(shape, rank, targets, device=device)
    task = random_adapter(shape, rank, targets, device="cpu", seed=1)
    on_cpu = Adapter({n: type(t)(t.A.cpu(), t.B.cpu(), t.scaling) for n, t in adapter.terms.items()}, shape.name)
    gain, cost = (core_fisher(adapter, samples, device=device, seed=seed) for seed in (1, 2))
    common = {"rank": rank, "targets": targets, "batch": samples}
    totals = {}
    for scope in scopes:
        totals[scope] = _scope(scope, gain, cost, task, on_cpu, record, ceilings64, common, device, repeats)
        free(device)
    return totals


def _scope(
    scope: str,
    gain: sst.Fisher,
    cost: sst.Fisher,
    task: Adapter,
    safety: Adapter,
    record: Recorder,
    ceilings64: Ceilings,
    common: dict[str, Any],
    device: str,
    repeats: int,
) -> float:
    space = sst.subspace(gain, cost, scope=scope)
    error = gates.gevp_gate(space)
    samples, n = common["batch"], sum(block.size for block in gain.blocks.values())
    count = 1 if scope == "global" else len(gain.blocks)
    rows, size = 2 * samples, n // count
    about = common | {"note": f"{count} pencil(s) of order {size}, {samples}+{samples} rows; {space.route}"}
    # What one pencil takes at least: the rows' inner products (half of them) or the modules' matrices, and the eigenproblems there.
    inner = min(rows, size)
    flops = 1.0 * rows * inner * n + 14.0 * count * min(samples, size) ** 3
    solved = measure(lambda: sst.subspace(gain, cost, scope=scope), device, repeats=repeats)
    record(
        "gevp", f"{scope}, subspace() with 4 held-out folds", solved, **about, error=error,
        flops=flops, floor_ms=ceilings64.floor_ms(flops=flops),
    )  # fmt: skip
    isotropic = measure(lambda: sst.subspace(gain, cost, scope=scope, metric="frobenius"), device, repeats=repeats)
    record("gevp", f"{scope}, subspace(metric='frobenius')", isotropic, **about)
    budget = space.soft(mu=float(space.values[len(space.values) // 4])).prediction.cost_per_label
    chosen = measure(lambda: space.soft(kl_budget=budget), device, repeats=repeats)
    record("filter", f"{scope}, soft(kl_budget), next time", chosen, **about)
    both = measure(lambda: sst.subspace(gain, cost, scope=scope).soft(kl_budget=budget), device, repeats=repeats)
    record("filter", f"{scope}, subspace() + soft(kl_budget)", both, **about)
    patch = space.soft(kl_budget=budget)
    with tempfile.TemporaryDirectory() as folder:
        written = measure(lambda: _export(task, safety, patch, Path(folder)), "cpu", repeats=repeats)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    record("export", f"{scope}, transform + concatenate + write", written, **about, bytes=size)
    total = both.median + written.median
    record("merge", f"SST-Merge {scope}: subspace + filter + export", **about, ms=total, basis="sum of measured")
    return total


def _export(task: Adapter, safety: Adapter, patch: sst.Patch, folder: Path) -> None:
    write_adapter(concatenate([(1.0, task), (1.0, transform(safety, patch.coordinates))]), folder)


def peft_merges(
    shape: Shape,
    record: Recorder,
    *,
    rank: int,
    targets: str,
    device: str,
    methods: tuple[str, ...] = ("dare_linear_svd", "svd", "ties_svd"),
    time_left: Callable[[], float],
) -> dict[str, float]:
    """PEFT's `add_weighted_adapter` with its defaults, once per distinct module shape, times the number of such modules.

    A shape that does not fit the time left is extrapolated from the measured ones by p·q·min(p, q), and the row says so.
    """
    counts = Counter(shape.modules(targets).values())
    names = {size: name.split(".")[1] for name, size in reversed(shape.linears(targets).items())}
    totals = {}
    for method in methods:
        spent: dict[tuple[int, int], float] = {}
        peak, guessed = 0.0, []
        for size in sorted(counts, key=lambda s: s[0] * s[1] * min(s)):
            expected = max((ms * _cube(size) / _cube(done) for done, ms in spent.items()), default=0.0) / 1e3
            if expected > time_left():
                guessed.append(size)
                continue
            merged = _peft_once(shape, method, names[size], rank, device)
            spent[size] = merged.median
            peak = max(peak, merged.peak_mib or 0.0)
            about = {"rank": rank, "targets": targets, "peak_mib": merged.peak_mib}
            record(
                "baseline",
                f"PEFT {method}, {size[0]}x{size[1]}",
                merged,
                **about,
                note=f"one of {counts[size]} modules",
            )
            free(device)
        if not spent:
            record("baseline", f"PEFT {method}", basis="skipped", rank=rank, targets=targets, note="time budget spent")
            continue
        for size in guessed:
            spent[size] = max(ms * _cube(size) / _cube(done) for done, ms in spent.items())
        total = sum(spent[size] * count for size, count in counts.items())
        note = f"one module of each shape times {sum(counts.values())} modules"
        if guessed:
            note += "; estimated by p*q*min(p,q): " + ", ".join(f"{p}x{q}" for p, q in guessed)
        record(
            "merge", f"PEFT {method}", ms=total, rank=rank, targets=targets, note=note, peak_mib=peak or None,
            basis="estimated" if guessed else "scaled",
        )  # fmt: skip
        totals[method] = total
    return totals


def _peft_once(shape: Shape, method: str, module: str, rank: int, device: str) -> Measured:
    model = build_model(
        shape.with_layers(1), rank=rank, modules=(module,), device=device, dtype=torch.float32, adapters=("a", "b")
    )
    merge = model.base_model.add_weighted_adapter
    return measure(
        lambda: merge(["a", "b"], [1.0, 0.5], "merged", combination_type=method, density=0.5),
        device,
        repeats=1,
        warmup=0,
    )


def peft_dare_linear(shape: Shape, record: Recorder, *, rank: int, targets: str, device: str) -> float:
    """PEFT's `dare_linear` (no SVD: A and B are merged separately, which is not the merge of ΔW) on two layers, scaled."""
    layers = min(2, shape.layers)
    model = build_model(
        shape.with_layers(layers), rank=rank, targets=targets, device=device, dtype=torch.float32, adapters=("a", "b")
    )
    names = iter(range(100))
    run = lambda: model.base_model.add_weighted_adapter(  # noqa: E731
        ["a", "b"], [1.0, 0.5], f"merged{next(names)}", combination_type="dare_linear", density=0.5
    )
    measured = measure(run, device, repeats=3)
    total = measured.median * shape.layers / layers
    record(
        "merge", "PEFT dare_linear (no SVD)", measured, ms=total, rank=rank, targets=targets, basis="scaled",
        note=f"{layers} of {shape.layers} layers; merges A and B separately",
    )  # fmt: skip
    return total


def factored_merges(
    shape: Shape, record: Recorder, *, rank: int, targets: str, device: str, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """The efficient peers over all modules of a model, module by module and stacked by shape; export is not in them."""
    error = gates.baseline_gate(device)
    groups = _stacked_tasks(shape, rank, targets, device, dtype)
    totals = {}
    for name, method in baselines.FACTORED.items():
        singles = [[(B[i], A[i]) for B, A in group] for group in groups for i in range(len(group[0][0]))]
        for style, modules in (("module by module", singles), ("stacked by shape", groups)):
            run = lambda: [method(tasks) for tasks in modules]  # noqa: B023, E731
            method(modules[0])
            measured = measure(run, device, repeats=3, warmup=0, seconds=4)
            record("merge", f"{name}, {style}", measured, rank=rank, targets=targets, error=error)
            totals[f"{name}, {style}"] = measured.median
            free(device)
    return totals


def dense_merges(
    shape: Shape, record: Recorder, *, rank: int, targets: str, device: str, time_left: Callable[[], float]
) -> dict[str, float]:
    """TSV-Merge, Subspace Boosting and DARE on ΔW, once per distinct shape, times the number of modules."""
    counts = Counter(shape.modules(targets).values())
    totals = {}
    for name, method in baselines.DENSE.items():
        spent: dict[tuple[int, int], float] = {}
        guessed = []
        for size in sorted(counts, key=_cube):
            expected = max((ms * _cube(size) / _cube(done) for done, ms in spent.items()), default=0.0) / 1e3
            if expected > time_left():
                guessed.append(size)
                continue
            tasks = [(t[0][0], t[1][0]) for t in _tasks(size, 1, rank, device, torch.float32)]
            spent[size] = measure(lambda: method(tasks), device, repeats=1, warmup=0).median  # noqa: B023
            free(device)
        if not spent:
            continue
        for size in guessed:
            spent[size] = max(ms * _cube(size) / _cube(done) for done, ms in spent.items())
        totals[name] = sum(spent[size] * count for size, count in counts.items())
        note = "one module of each shape, scaled" + ("; some estimated" if guessed else "")
        basis = "estimated" if guessed else "scaled"
        record("merge", name, ms=totals[name], rank=rank, targets=targets, note=note, basis=basis)
    return totals


def kfac_gevp(
    shape: Shape, record: Recorder, *, rank: int, targets: str, device: str, time_left: Callable[[], float]
) -> None:
    """What a dense Kronecker pencil costs: one float32 generalized eigenproblem per wide factor (torch eigh after Cholesky)."""
    counts = Counter(d for size in shape.modules(targets).values() for d in size)
    spent: dict[int, float] = {}
    guessed = []
    for d in sorted(counts):
        expected = max((ms * (d / done) ** 3 for done, ms in spent.items()), default=0.0) / 1e3
        if expected > time_left():
            guessed.append(d)
            continue
        a, b = (_factor(d, device, seed) for seed in (0, 1))
        spent[d] = measure(lambda: _dense_pencil(a, b), device, repeats=1, warmup=0).median  # noqa: B023
        free(device)
    for d in guessed:
        spent[d] = max(ms * (d / done) ** 3 for done, ms in spent.items())
    total = sum(spent[d] * count for d, count in counts.items())
    note = "; ".join(f"{d}: {spent[d]:.0f} ms x {count}" for d, count in sorted(counts.items()))
    record(
        "merge", "dense K-FAC pencils (torch)", ms=total, rank=rank, targets=targets, note=note,
        basis="estimated" if guessed else "scaled", state_bytes=2 * shape.kfac_bytes(targets),
    )  # fmt: skip


def _dense_pencil(a: Tensor, b: Tensor) -> Any:
    factor = torch.linalg.cholesky(b)
    half = torch.linalg.solve_triangular(factor, a, upper=False)
    return torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))


def _factor(d: int, device: str, seed: int) -> Tensor:
    x = torch.randn(d + 8, d, device=device, generator=torch.Generator(device).manual_seed(seed))
    return x.mT @ x / len(x) + 0.1 * torch.eye(d, device=device)


def _tasks(
    size: tuple[int, int], count: int, rank: int, device: str, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    p, q = size
    return [
        (
            torch.randn(count, p, rank, device=device, dtype=dtype),
            torch.randn(count, rank, q, device=device, dtype=dtype),
        )
        for _ in range(2)
    ]


def _stacked_tasks(
    shape: Shape, rank: int, targets: str, device: str, dtype: torch.dtype
) -> list[list[tuple[Tensor, Tensor]]]:
    return [
        _tasks(size, count, rank, device, dtype) for size, count in Counter(shape.modules(targets).values()).items()
    ]


def _cube(size: tuple[int, int]) -> float:
    return float(size[0]) * size[1] * min(size)
