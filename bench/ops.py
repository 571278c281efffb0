"""Each op against its physical floor, against the torch form of it, and against torch.compile of that form.

    python -m bench.ops [--quick] [--sweep] [--ops gram sketch] [--out FILE]

The floor is the larger of bytes over measured copy bandwidth and flops over measured GEMM rate; both are measured first, on this device.
Values are checked against float64 before anything is timed, and a wrong form is not timed. The forms of a case take turns; `ratio` is a
form's time over the torch form's. On CUDA (bfloat16) each call meets a cold L2 cache and is queued behind a sleep that outlasts its
launching, which is checked; what launching costs the caller is in the note. On a CPU (float32) the sizes are small.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.common import ROOT, Measured, Recorder, free, in_turn, measure_ceilings, peak_mib, stopwatch

import torch  # isort: skip
from torch import Tensor

from sst_kernels import ops
from sst_kernels.testing import error_ratio

ALLOWED = 1e-5
Run = Callable[[], object]
Configuration = dict[str, int]


@dataclass(frozen=True)
class Size:
    """B samples of T tokens, rank (or sketch width) r, wide side d, and how many modules one core_outer call takes."""

    B: int
    T: int
    r: int
    d: int
    modules: int

    @property
    def S(self) -> int:
        return self.B * self.T


@dataclass
class Case:
    """One op on fixed `inputs`, and the `state` it writes to. `plain` is the torch form of both; `arrange` makes the op's arguments of
    them. bytes, flops: the least that it must move and compute. candidates: configurations of its kernel."""

    op: str
    width: str
    inputs: list[Tensor]
    state: list[Tensor]
    arrange: Callable[..., tuple]
    plain: Callable[..., object]
    bytes: int
    flops: int
    candidates: tuple[Configuration, ...] = ()

    def call(self, *tensors: Tensor, **configuration: int) -> None:
        """The op, or its kernel in a configuration."""
        name, _, _ = self.op.partition(" ")
        if name == "project":  # of the sketch kernel's, an op of its own there
            x, u, out = tensors
            out.copy_(kernel("sketch", "project")(x, u, "tf32x3", **configuration))
        elif configuration:
            kernel(name, name)(*self.arrange(*tensors), "ieee", **configuration)
        else:
            getattr(ops, name)(*self.arrange(*tensors))


class Draw:
    """Random inputs of one size: tokens in `dtype`, every sample T long, a scale per sample."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype):
        self.size, self.device, self.dtype = size, device, dtype
        self.generator = torch.Generator(device).manual_seed(size.S + size.r + size.d)
        self.spans = ops.spans_from_lengths(size.B, size.T, device=device)
        self.scale = torch.rand(size.B, generator=self.generator, device=device) + 0.5
        self.squares = self.scale.square().repeat_interleave(size.T)[:, None]

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device)

    def gradients(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """scale_n Σ_t left_t right_tᵀ [B, p, q] in the dtype of `out`, in torch."""
        by_sample = lambda x: x.view(self.size.B, self.size.T, -1)  # noqa: E731
        return mm(by_sample(left).mT, by_sample(right)) * self.scale[:, None, None].to(out.dtype)

    def with_spans(self, left: Tensor, right: Tensor, *rest: Tensor) -> tuple:
        return left, right, self.spans, self.scale, *rest

    def sides(self) -> tuple[tuple[str, int, int], ...]:
        """(name, p, q) of gradients with respect to A and B."""
        return ("A", self.size.r, self.size.d), ("B", self.size.d, self.size.r)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Product with float32 result: of bfloat16 operands without widening them where torch can."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        return (torch.bmm if a.ndim == 3 else torch.mm)(a, b, out_dtype=torch.float32)
    return (a if a.dtype == torch.float64 else a.float()) @ (b if b.dtype == torch.float64 else b.float())


def grid(**choices: tuple[int, ...]) -> tuple[Configuration, ...]:
    return tuple(dict(zip(choices, values)) for values in itertools.product(*choices.values()))


def narrow_tiles(p: int, q: int, wide: tuple[int, ...], warps: tuple[int, ...]) -> tuple[Configuration, ...]:
    """Candidates for the factor kernels: the narrow side whole, the wide side at several tile widths."""
    narrow = {"BP" if p <= q else "BQ": max(16, min(64, 1 << (min(p, q) - 1).bit_length()))}
    side = "BQ" if p <= q else "BP"
    return tuple(narrow | c for c in grid(**{side: wide}, BT=(64, 128), num_warps=warps, num_stages=(3, 4)))


def kernel(op: str, function: str) -> Callable[..., Tensor]:
    """The launcher of an op, which takes configurations; imported late, since it needs Triton."""
    return getattr(importlib.import_module(f"sst_kernels.ops.{op}.kernel"), function)


def core_outer(draw: Draw) -> Iterator[Case]:
    B, S, r, m, e = draw.size.B, draw.size.S, draw.size.r, draw.size.modules, draw.dtype.itemsize

    def plain(*args: Tensor) -> None:
        *tokens, out = args
        for i in range(m):
            out[:, i * r * r : (i + 1) * r * r] = draw.gradients(tokens[i], tokens[m + i], out).flatten(1)

    arrange = lambda *a: (a[:m], a[m:-1], draw.spans, draw.scale, a[-1])  # noqa: E731
    work = 2 * e * m * S * r + 4 * B * m * r * r, 2 * m * S * r * r
    configurations = grid(BT=(32, 64, 128), num_warps=(1, 2, 4), num_stages=(2, 4))
    tokens = [draw(S, r) for _ in range(2 * m)]
    yield Case("core_outer", f"{m} modules", tokens, [draw.zeros(B, m * r * r)], arrange, plain, *work, configurations)


def factor_rows(draw: Draw) -> Iterator[Case]:
    B, S, e = draw.size.B, draw.size.S, draw.dtype.itemsize

    def plain(left: Tensor, right: Tensor, out: Tensor) -> None:
        out.copy_(draw.gradients(left, right, out).flatten(1))

    for side, p, q in draw.sides():
        work = e * S * (p + q) + 4 * B * p * q, 2 * S * p * q
        inputs, state, tiles = [draw(S, p), draw(S, q)], [draw.zeros(B, p * q)], narrow_tiles(p, q, (32, 64, 128), (4,))
        yield Case(f"factor_rows {side}", f"d={draw.size.d}", inputs, state, draw.with_spans, plain, *work, tiles)


def factor_moments(draw: Draw) -> Iterator[Case]:
    S, e = draw.size.S, draw.dtype.itemsize

    def plain(left: Tensor, right: Tensor, total: Tensor, square: Tensor) -> None:
        G = draw.gradients(left, right, square)
        total += G.sum(0)
        square += G.square().sum(0)

    for side, p, q in draw.sides():
        work = e * S * (p + q) + 16 * p * q, 2 * S * p * q
        inputs, state = [draw(S, p), draw(S, q)], [draw.zeros(p, q), draw.zeros(p, q)]
        tiles = narrow_tiles(p, q, (16, 32, 64), (2, 4))
        yield Case(f"factor_moments {side}", f"d={draw.size.d}", inputs, state, draw.with_spans, plain, *work, tiles)


def gram(draw: Draw) -> Iterator[Case]:
    S, d, e = draw.size.S, draw.size.d, draw.dtype.itemsize

    def plain(x: Tensor, out: Tensor) -> None:
        out += mm(x.T, x)

    def scaled(x: Tensor, out: Tensor) -> None:
        out += mm(x.T.to(out.dtype) * draw.squares.T.to(out.dtype), x.to(out.dtype))

    tiles = ("BD", "BT", "num_warps", "num_stages")
    several = ((128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 4, 5), (128, 32, 8, 5),
               (128, 128, 8, 2), (256, 32, 8, 3), (64, 128, 4, 3))  # fmt: skip
    configurations = (*(dict(zip(tiles, c)) for c in several), dict(zip((*tiles, "maxnreg"), (128, 64, 8, 3, 128))))
    own = grid(BD=(64, 128), BT=(32, 64, 128), num_warps=(8,), num_stages=(3, 4))
    for name, form, given, choices in (
        ("gram", plain, (None, None), configurations),
        ("gram scaled", scaled, (draw.spans, draw.scale), own),
    ):
        arrange = lambda x, out, given=given: (x, *given, out)  # noqa: E731
        work = e * S * d + 4 * d * d, S * d * d
        yield Case(name, f"d={d}", [draw(S, d)], [draw.zeros(d, d)], arrange, form, *work, choices)


def sketch(draw: Draw) -> Iterator[Case]:
    B, S, d, l, e = draw.size.B, draw.size.S, draw.size.d, draw.size.r, draw.dtype.itemsize

    def plain(x: Tensor, omega: Tensor, out: Tensor) -> None:
        z = mm(x, omega).to(out.dtype)
        w = z * draw.squares.to(out.dtype)
        out[:d] += x.to(out.dtype).T @ w
        out[d:] += z.T @ w

    def product(x: Tensor, u: Tensor, out: Tensor) -> None:
        out.copy_(mm(x, u))

    work = e * (S * d + d * l) + 8 * (d + l) * l, 4 * S * d * l + 2 * S * l * l
    tiles = grid(BD=(32, 64, 128), BT=(32, 64), num_warps=(4, 8))
    inputs, state = [draw(S, d), draw(d, l)], [draw.zeros(d + l, l)]
    yield Case("sketch", f"d={d}", inputs, state, draw.with_spans, plain, *work, tiles)
    if draw.device != "cuda":
        return
    tiles = grid(parts=(1, 2, 4), BT=(64, 128), BD=(32, 64), BL=(32, 64), num_warps=(4,), num_stages=(3,))
    for name, rows, k, dtype in (("bf16", S, l, torch.bfloat16), ("rotate", B * l, d, torch.float32)):
        inputs, state = [draw(rows, d, dtype=dtype), draw(d, k, dtype=dtype)], [draw.zeros(rows, k)]
        work = dtype.itemsize * (rows * d + d * k) + 4 * rows * k, 2 * rows * d * k
        yield Case(f"project {name}", f"d={d}", inputs, state, draw.with_spans, product, *work, tiles)


def eigen_moments(draw: Draw) -> Iterator[Case]:
    B, S, p, q, e = draw.size.B, draw.size.S, draw.size.r, draw.size.d, draw.dtype.itemsize

    def plain(left: Tensor, right: Tensor, u_left: Tensor, u_right: Tensor, out: Tensor) -> None:
        out += (u_left.T @ draw.gradients(left, right, out) @ u_right).square().sum(0)

    wide = {"dtype": torch.float32}
    inputs = [draw(S, p), draw(S, q), torch.linalg.qr(draw(p, p, **wide))[0], draw(q, q, **wide) / q**0.5]
    moved = e * S * (p + q) + 4 * (p * p + q * q) + 8 * p * q
    flops = 2 * min(S * q * q + S * p * q, S * p * q + B * p * q * q)
    yield Case("eigen_moments", f"d={q}", inputs, [draw.zeros(p, q)], draw.with_spans, plain, moved, flops)


CASES = {f.__name__: f for f in (core_outer, factor_rows, factor_moments, gram, sketch, eigen_moments)}


class Clock:
    """Milliseconds of single calls on a device; on a GPU with cold caches, and all of a call queued before the device comes to it."""

    def __init__(self, device: str, rounds: int):
        self.device, self.rounds = device, rounds
        self.once = self._queued if device == "cuda" else stopwatch(device)
        self.cycles = 20_000_000  # of sleep ahead of a call: some 10 ms
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None

    def in_turn(self, runs: dict[str, Run]) -> dict[str, Measured]:
        """`rounds` times of each, one after the other in every round, after one call of each."""
        return in_turn(runs, self.device, self.rounds, clock=self.once)

    def _queued(self, run: Run) -> float:
        """Time between events around `run`. Where the device reached the first before the host had queued the last, the host may be in
        it: then it counts for nothing, and the device sleeps longer. RuntimeError for a call that itself waits for the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while self.cycles < 1 << 32:
            torch.cuda._sleep(self.cycles)
            self.flush.zero_()
            begin.record()
            run()
            end.record()
            early = begin.query()
            end.synchronize()
            if not early:
                return begin.elapsed_time(end)
            self.cycles *= 2
        raise RuntimeError("the call waits for the device, so that its time there cannot be told from the host's")

    def host(self, run: Run) -> str:
        """What a call costs the caller, the device not waited for."""
        if self.flush is None:
            return ""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            run()
        spent = (time.perf_counter() - begin) / 20
        torch.cuda.synchronize()
        return f"host {1e6 * spent:.0f} us a call"


def error_of(case: Case, call: Callable[..., object], expected: list[Tensor]) -> float:
    """Worst error ratio of one call against float64; the lower triangle of a Gram matrix, which is all that `gram` writes."""
    state = [s.clone() for s in case.state]
    call(*case.inputs, *state)
    part = torch.tril if case.op.startswith("gram") else torch.clone
    return max(error_ratio(part(a), part(e)) for a, e in zip(state, expected))


def measure_case(case: Case, forms: dict[str, Callable[..., object]], clock: Clock, record: Recorder, ceilings) -> None:
    """Check every form, time those that are right, write a row for each."""
    expected = [s.double() for s in case.state]
    case.plain(*(x.double() for x in case.inputs), *expected)
    work = {"bytes": case.bytes, "flops": case.flops, "floor_ms": ceilings.floor_ms(case.bytes, case.flops)}
    errors: dict[str, float] = {}
    for form, call in forms.items():
        try:
            error = error_of(case, call, expected)
        except Exception as problem:  # a configuration that does not fit must not cost the others
            record(case.op, form, **work, basis="failed", note=f"{type(problem).__name__}: {str(problem)[:80]}")
            continue
        if error <= ALLOWED:
            errors[form] = error
        else:
            record(case.op, form, **work, error=error, basis="failed", note="wrong: not timed")
    state = [s.clone() for s in case.state]
    runs = {form: (lambda call=forms[form]: call(*case.inputs, *state)) for form in errors}
    taken = clock.in_turn(runs)
    plain = taken.get("torch")
    for form, run in runs.items():
        beside = {"plain_ms": plain.median, "ratio": taken[form].median / plain.median} if plain else {}
        beside["peak_mib"] = peak_mib(run, clock.device)
        record(case.op, form, taken[form], **work | beside, error=errors[form], note=clock.host(run))


def sizes(op: str, device: str, modules: int, few: bool) -> Iterator[Size]:
    """core_outer has no d, gram no r, and eigen_moments no d beyond 5120, where its basis alone is 484 MB."""
    if device == "cpu":
        points = itertools.product((1, 8), (64, 256), (16, 64), (512,))
        points = [(8, 64, 16, 256)] if few else points
    elif few:
        wide = [(1, 2048, 64, 4096)] if op in ("core_outer", "sketch", "factor_moments") else []
        points = [(8, 512, 16, 4096), *wide, *([(8, 512, 512, 4096)] if op == "sketch" else [])]
    else:
        ranks = (16, 64, 512) if op == "sketch" else (8, 16, 64)
        points = itertools.product((1, 8), (512, 2048), ranks, (4096, 5120, 11008))
    seen = set()
    for B, T, r, d in points:
        key = (B, T, r) if op == "core_outer" else (B, T, d) if op == "gram" else (B, T, r, d)
        if key not in seen and not (op == "eigen_moments" and d > 5120):
            seen.add(key)
            yield Size(B, T, r, d, modules)


def main(arguments: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one or two sizes per op: at most two minutes on an H100")
    parser.add_argument("--sweep", action="store_true", help="time a handful of kernel configurations per op instead")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--ops", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--out", type=Path, help="default: bench/results/ops[_sweep]_<device>.csv; rows are appended")
    parser.add_argument("--modules", type=int, help="modules of one core_outer call (224 on a GPU: 7B, all linear)")
    options = parser.parse_args(arguments)
    few = options.quick or options.sweep
    out = options.out or ROOT / "bench/results" / f"ops{'_sweep' if options.sweep else ''}_{device}.csv"
    modules = options.modules or (224 if device == "cuda" else 28)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ceilings = measure_ceilings(device, dtype, Recorder(out, device))
    clock = Clock(device, 15)
    compiled: set[str] = set()
    for op in options.ops:
        for size in sizes(op, device, modules, few):
            for case in CASES[op](Draw(size, device, dtype)):
                record = Recorder(out, device, model=case.width, rank=size.r, batch=size.B, length=size.T)
                forms: dict[str, Callable[..., object]] = {"sst": case.call}
                if options.sweep:
                    for config in case.candidates:
                        label = " ".join(f"{k}={v}" for k, v in config.items())
                        forms[label] = partial(case.call, **config)
                else:
                    forms["torch"] = case.plain
                    # Unrolled over the modules of a model, core_outer compiles for minutes; a quick run compiles each op once.
                    if options.compile and op != "core_outer" and not (options.quick and case.op in compiled):
                        compiled.add(case.op)
                        torch._dynamo.reset()
                        forms["torch.compile"] = torch.compile(case.plain)
                measure_case(case, forms, clock, record, ceilings)
            free(device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
