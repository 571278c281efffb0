"""Ahead-of-time compilation of every kernel and configuration for sm_80, sm_90 and sm_100, without a GPU.

Shown for each: the tensor-core instruction is there, TF32 only where asked, shared memory fits, nothing spills. The
compiler must not be the interpreter, which this session's conftest.py chose, so a process of its own compiles:

    python tests/test_aot.py [--all] [--jobs 8] [--csv bench/results/aot.csv]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS_PER_SM = 65536
PROCESSORS = {80: 108, 90: 132, 100: 148}
sys.path.insert(0, str(ROOT))
COLUMNS = (
    *(
        "kernel",
        "sm",
        "warps",
        "stages",
        "shared_bytes",
        "registers",
        "stack",
        "local",
        "mma_sync",
        "wgmma",
        "tcgen05",
        "tf32",
    ),
    *("fma", "async_copies", "of_16_bytes", "loads", "of_vectors", "precision"),
)
POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int64": "*i64", "float64": "*fp64"}


@dataclass
class Variant:
    """One kernel at one configuration: its constants, its launch options, and the pointer types of its arguments."""

    name: str
    kernel: object
    pointers: dict[str, str]
    constants: dict[str, object]
    options: dict[str, int]
    aligned: bool = True

    @property
    def precision(self) -> str:
        """ "exact" for 16-bit operands, else the precision asked for, or "" where nothing is multiplied.

        Against 16-bit operands, float32 ones are split into bfloat16 terms.
        """
        asked = self.constants.get("PRECISION", "")
        return asked if " fp32" in self.name.replace("16 x fp32", "16") else asked and "exact"


@functools.cache
def variants(everything: bool, capability: int) -> dict[str, Variant]:
    """All variants that the launchers' plans can choose on this chip, or a few: bfloat16, and the float32 products.

    What is optional (scale, spans, weights, a second output) is varied at one size; the others take all of it, which needs the
    most registers. "odd" variants are those of sizes and strides that no vector load divides.
    """
    import torch

    from sst_kernels.ops import tiles
    from sst_kernels.ops.core_outer import kernel as core
    from sst_kernels.ops.factor_moments import kernel as moments
    from sst_kernels.ops.factor_rows import kernel as rows
    from sst_kernels.ops.gram import kernel as gram
    from sst_kernels.ops.sketch import kernel as sketch

    chip = tiles.Chip(PROCESSORS[capability], reads_shared=capability >= 90)
    out: dict[str, Variant] = {}

    def add(name, kernel, pointers, plan, odd=None, aligned=True, **constants):
        plan = dict(plan)
        options = {"num_warps": plan.pop("num_warps"), "num_stages": plan.pop("num_stages", 3)}
        options |= {"maxnreg": plan.pop("maxnreg")} if "maxnreg" in plan else {}
        plan.pop("parts", None)
        label = " ".join([name, *(f"{k}={v}" for k, v in (plan | constants | options).items())])
        out.setdefault(label, Variant(label, kernel, pointers, plan | constants, options, aligned))
        if everything and aligned and "fp32" not in name and plan.get("BT") and usual:
            add(f"{name} odd", kernel, pointers, odd or plan | options, aligned=False, **constants)

    def optional(*flags):
        """Every combination of the flags at the usual size, else all of them."""
        return itertools.product((True, False), repeat=len(flags)) if everything and usual else [(True,) * len(flags)]

    dtypes = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    ranks = (4, 8, 16, 32, 64, 128) if everything else (16,)
    widths = (576, 1536, 4096, 5120, 11008) if everything else (4096,)
    for (short, dtype), precision in itertools.product(dtypes.items(), ("ieee", "tf32x3", "tf32")):
        wide = dtype == "float32"
        if precision != "ieee" and not wide:
            continue
        if not everything and (precision == "tf32" or short == "fp16"):
            continue
        few = wide and not everything
        for r in ranks:
            usual = r == 16
            for (scaled,) in optional("scale"):
                add(
                    f"core_outer {short} r={r}",
                    core.core_outer_kernel,
                    {"table": "int64", "spans": "int64", "out": "float32"} | ({"scale": "float32"} if scaled else {}),
                    core.plan(r, r, wide),
                    DTYPE_LEFT=core._TYPES[getattr(torch, dtype)],
                    DTYPE_RIGHT=core._TYPES[getattr(torch, dtype)],
                    P=r,
                    Q=r,
                    HAS_SCALE=scaled,
                    PRECISION=precision,
                )
        for r, d, flip in itertools.product(ranks, () if few else widths, (False, True) if everything else (False,)):
            p, q = (d, r) if flip else (r, d)
            usual = (r, d) == (16, 4096)
            for (scaled,), N, stored in itertools.product(optional("scale"), (1, 8), ("float32", "bfloat16")):
                if short != "bf16" and stored == "bfloat16":
                    continue
                add(
                    f"factor_rows {short} to {stored}",
                    rows.factor_rows_kernel,
                    {"left": dtype, "right": dtype, "spans": "int64", "out": stored}
                    | ({"scale": "float32"} if scaled else {}),
                    rows.plan(p, q, N, wide, chip),
                    HAS_SCALE=scaled,
                    PRECISION=precision,
                )
            plan = moments.plan(p, q, wide, chip)
            plan_short = moments.plan_short(plan, wide, dtype == "float16")
            for (kernel, options), (scaled, summed) in itertools.product(
                ((moments.factor_moments_kernel, plan), (moments.short_moments_kernel, plan_short)),
                optional("scale", "sum"),
            ):
                add(
                    f"{kernel.__name__.removesuffix('_kernel')} {short}",
                    kernel,
                    {"left": dtype, "right": dtype, "spans": "int64", "sumsq": "float32"}
                    | {"singles": "float32", "others": "int64", "count": "int64"}
                    | ({"scale": "float32"} if scaled else {})
                    | ({"sum": "float32"} if summed else {}),
                    options,
                    HAS_SCALE=scaled,
                    HAS_SUM=summed,
                    PRECISION=precision,
                )
        for d, (spans, scaled, weighted) in itertools.product(
            () if few else (*(r for r in ranks if everything), *widths),
            ((False, False, False), (True, False, False), (True, True, False), (False, False, True)),
        ):
            usual = d == 4096
            plan, odd = (gram.plan(d, wide, scaled, odd, chip) for odd in (False, True))
            if weighted:
                plan, odd = gram.plan_weighted(plan), gram.plan_weighted(odd)
            add(
                f"gram {short}",
                gram.gram_kernel,
                {"x": dtype, "out": "float32"}
                | ({"spans": "int64"} if spans else {})
                | ({"scale": "float32"} if scaled else {})
                | ({"weights": "float32"} if weighted else {}),
                plan,
                odd,
                HAS_SPANS=spans,
                HAS_SCALE=scaled,
                HAS_WEIGHTS=weighted,
                SPLIT=gram.plan_parts(d, 4096, 8 if spans else None, plan, chip)[1] > 1,
                PRECISION=precision,
            )
        for d, l, mixed in itertools.product(widths, (16, 64, 128, 512) if everything else (64, 512), (False, True)):
            if mixed and wide:
                continue
            usual = (d, l) == (4096, 64)
            stored = "bfloat16" if short == "bf16" else "float32"
            name, operand = f"{short}{' x fp32' if mixed else ''}", "float32" if mixed or wide else dtype
            stages = [sketch.plan_sketch(4096, d, l, wide, small, chip) for small in (mixed and short == "fp16", True)]
            for weighted, traced in optional("weights", "trace"):
                weights = {"weights": "float32"} if weighted else {}
                squares = {"squares": "float32"} if traced else {}
                add(
                    f"project {name}",
                    sketch.project_kernel,
                    {"x": dtype, "u": operand, "z": stored} | weights | squares,
                    *(project for project, _ in stages),
                    HAS_WEIGHTS=weighted,
                    HAS_SQUARES=traced,
                    PRECISION=precision,
                )
                if not mixed:
                    add(
                        f"back {short}{' x fp32' if short == 'fp16' else ''}",
                        sketch.back_kernel,
                        {"x": dtype, "w": stored, "out": "float32"}
                        | ({"trace": "float64"} | squares if traced else {})
                        | weights,
                        *(back for _, back in stages),
                        HAS_WEIGHTS=weighted,
                        HAS_TRACE=traced,
                        PRECISION=precision,
                    )
            if l <= 128:  # rotations of gradients and tokens
                add(
                    f"project {name} unrounded",
                    sketch.project_kernel,
                    {"x": dtype, "u": operand, "z": "float32"},
                    sketch.plan_project(4096, d, l, wide, mixed and short == "fp16", chip),
                    sketch.plan_project(4096, d, l, wide, True, chip),
                    HAS_WEIGHTS=False,
                    HAS_SQUARES=False,
                    PRECISION=precision,
                )
    usual = False
    for scaled in (True, False):
        add(
            "token_weights",
            tiles.token_weights_kernel,
            {"weights": "float32", "spans": "int64"} | ({"scale": "float32"} if scaled else {}),
            {"num_warps": 4, "num_stages": 3, "BT": 64, "BN": 32},
            HAS_SCALE=scaled,
        )
        add(
            "singles",
            moments.singles_kernel,
            {"singles": "float32", "spans": "int64"} | ({"scale": "float32"} if scaled else {}),
            {"num_warps": 4, "num_stages": 3, "BT": 64, "BN": 32},
            HAS_SCALE=scaled,
        )
    for lower, strided in itertools.product((True, False), repeat=2):
        add(
            "add_partials",
            tiles.add_partials_kernel,
            {"partials": "float32", "out": "float32"},
            {"num_warps": 4, "num_stages": 3, "BLOCK": 1024},
            LOWER=lower,
            STRIDED=strided,
        )
    return out


def compile_variant(variant: Variant, capability: int):
    """triton.compile for a target that is not there: pointers, and sizes unless odd, divisible by 16, as a model's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes, constants = {}, {}, dict(variant.constants)
    for i, name in enumerate(variant.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in variant.pointers:
            signature[name] = POINTER[variant.pointers[name]]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in ("spans", "scale", "sum", "weights", "squares", "trace"):
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = "i32"
            if variant.aligned and name not in ("N", "parts", "count"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constants, attributes)
    options = {**variant.options, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def describe(everything: bool, capability: int, name: str) -> dict[str, object]:
    """One row of the table: resources and instruction mix of the variant of that name."""
    from bench.machine import resources

    variant = variants(everything, capability)[name]
    binary = compile_variant(variant, capability)
    ptx = binary.asm["ptx"]
    count = lambda pattern: len(re.findall(pattern, ptx))  # noqa: E731
    return {
        "kernel": variant.name,
        "sm": capability,
        "warps": variant.options["num_warps"],
        "stages": variant.options["num_stages"],
        "shared_bytes": binary.metadata.shared,
        **resources(binary.asm["cubin"]),
        "mma_sync": count(r"mma\.sync"),
        "wgmma": count(r"wgmma\.mma_async"),
        "tcgen05": count(r"tcgen05\.mma"),
        "tf32": count(r"mma\S*\.tf32|kind::tf32"),
        "fma": count(r"\bfma\.rn\.f32"),
        "async_copies": count(r"cp\.async\.c[ag]|cp\.async\.bulk"),
        "of_16_bytes": count(r"cp\.async\.cg[^;]*0x10"),
        "loads": count(r"\bld\.global"),
        "of_vectors": count(r"\bld\.global\S*\.v[24]"),
        "precision": variant.precision,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every configuration, not a representative few")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--sm", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=1, help="compile in this many processes")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    args = parser.parse_args()
    jobs = [(args.all, sm, name) for sm in args.sm for name in variants(args.all, sm) if args.only in name]
    with contextlib.ExitStack() as stack:
        described = itertools.starmap(describe, jobs)
        if args.jobs > 1:
            pool = stack.enter_context(ProcessPoolExecutor(args.jobs, get_context("spawn")))
            described = pool.map(describe, *zip(*jobs), chunksize=4)
        file = stack.enter_context(args.csv.open("w", newline="")) if args.csv else io.StringIO()
        writer, rows = csv.DictWriter(file, COLUMNS, lineterminator="\n"), []
        writer.writeheader()
        for row in described:
            rows.append(row)
            writer.writerow(row)
            file.flush()
    json.dump(rows, sys.stdout)


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def rows(request, tmp_path_factory):
    """The table, from a process in which triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if not os.access(Path("~").expanduser(), os.W_OK):  # where triton keeps what it has compiled
        environment.setdefault("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    command = [sys.executable, __file__, *(["--all"] if request.param == "all" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def offenders(rows, condition):
    return [f"{r['kernel']} sm_{r['sm']}: {r}" for r in rows if not condition(r)]


def test_every_architecture_is_there(rows):
    assert {r["sm"] for r in rows} == set(ARCHITECTURES)


def test_products_run_on_tensor_cores(rows):
    """16-bit operands and TF32 multiply on tensor cores; float32 "ieee" products are fused multiply-adds."""
    instructions = {80: ("mma_sync",), 90: ("mma_sync", "wgmma"), 100: ("mma_sync", "tcgen05")}

    def holds(r):
        used = sum(r[i] for i in instructions[r["sm"]])
        return used > 0 if r["precision"] in ("exact", "tf32", "tf32x3") else r["precision"] == "" or r["fma"] > 0

    assert not offenders(rows, holds)


def test_tf32_only_where_asked(rows):
    assert not offenders(rows, lambda r: (r["tf32"] > 0) == (r["precision"] in ("tf32", "tf32x3")))


def test_shared_memory_and_registers_fit(rows):
    def holds(r):
        return r["shared_bytes"] <= SHARED_LIMIT[r["sm"]] and r["registers"] * r["warps"] * 32 <= REGISTERS_PER_SM

    assert not offenders(rows, holds)


def test_nothing_spills(rows):
    assert not offenders(rows, lambda r: r["stack"] == 0 and r["local"] == 0)


def test_sixteen_bit_loads_are_asynchronous(rows):
    """Every tile of a 16-bit kernel is copied to shared memory while the previous one is multiplied, 16 bytes at a time where
    rows are that long and lie side by side."""
    exact = [r for r in rows if r["precision"] == "exact" and " odd " not in r["kernel"]]
    assert not offenders(exact, lambda r: r["async_copies"] > 0)
    scattered = ("short_moments", "core_outer bf16 r=4", "core_outer fp16 r=4")
    assert not offenders([r for r in exact if not r["kernel"].startswith(scattered)], lambda r: r["of_16_bytes"] > 0)


if __name__ == "__main__":
    main()
