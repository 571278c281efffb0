"""Each op against its physical floor, against the torch form of it, and against torch.compile of that form.

    python -m bench.ops [--quick] [--ops gram sketch] [--out FILE]

The floor is the larger of bytes over measured copy bandwidth and flops over measured GEMM rate; both are measured first, on this device.
Values are checked against float64 before anything is timed, and a wrong form is not timed. The forms of a case take turns; `ratio` is a
form's time over the torch form's. On CUDA (bfloat16) each call meets a cold L2 cache and is queued behind a sleep that outlasts its
launching, which is checked; what launching costs the caller is in the note. On a CPU (float32) the sizes are small.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.common import ROOT, Recorder, free, in_turn, measure_ceilings, peak_mib, stopwatch

import torch  # isort: skip
from torch import Tensor

from sst_kernels import ops
from sst_kernels.testing import error_ratio

ALLOWED = 1e-5
Run = Callable[[], object]


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
    them. bytes, flops: the least that it must move and compute."""

    op: str
    width: str
    inputs: list[Tensor]
    state: list[Tensor]
    arrange: Callable[..., tuple]
    plain: Callable[..., object]
    bytes: int
    flops: int

    def call(self, *tensors: Tensor) -> None:
        getattr(ops, self.op.split(" ")[0])(*self.arrange(*tensors))


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


def core_outer(draw: Draw) -> Iterator[Case]:
    B, S, r, m, e = draw.size.B, draw.size.S, draw.size.r, draw.size.modules, draw.dtype.itemsize

    def plain(*args: Tensor) -> None:
        *tokens, out = args
        for i in range(m):
            out[:, i * r * r : (i + 1) * r * r] = draw.gradients(tokens[i], tokens[m + i], out).flatten(1)

    arrange = lambda *a: (a[:m], a[m:-1], draw.spans, draw.scale, a[-1])  # noqa: E731
    work = 2 * e * m * S * r + 4 * B * m * r * r, 2 * m * S * r * r
    tokens = [draw(S, r) for _ in range(2 * m)]
    yield Case("core_outer", f"{m} modules", tokens, [draw.zeros(B, m * r * r)], arrange, plain, *work)


def factor_rows(draw: Draw) -> Iterator[Case]:
    B, S, e = draw.size.B, draw.size.S, draw.dtype.itemsize

    def plain(left: Tensor, right: Tensor, out: Tensor) -> None:
        out.copy_(draw.gradients(left, right, out).flatten(1))

    for side, p, q in draw.sides():
        work = e * S * (p + q) + 4 * B * p * q, 2 * S * p * q
        inputs, state = [draw(S, p), draw(S, q)], [draw.zeros(B, p * q)]
        yield Case(f"factor_rows {side}", f"d={draw.size.d}", inputs, state, draw.with_spans, plain, *work)


def factor_moments(draw: Draw) -> Iterator[Case]:
    S, e = draw.size.S, draw.dtype.itemsize

    def plain(left: Tensor, right: Tensor, total: Tensor, square: Tensor) -> None:
        G = draw.gradients(left, right, square)
        total += G.sum(0)
        square += G.square().sum(0)

    for side, p, q in draw.sides():
        work = e * S * (p + q) + 16 * p * q, 2 * S * p * q
        inputs, state = [draw(S, p), draw(S, q)], [draw.zeros(p, q), draw.zeros(p, q)]
        yield Case(f"factor_moments {side}", f"d={draw.size.d}", inputs, state, draw.with_spans, plain, *work)


def gram(draw: Draw) -> Iterator[Case]:
    S, d, e = draw.size.S, draw.size.d, draw.dtype.itemsize

    def plain(x: Tensor, out: Tensor) -> None:
        out += mm(x.T, x)

    def scaled(x: Tensor, out: Tensor) -> None:
        out += mm(x.T.to(out.dtype) * draw.squares.T.to(out.dtype), x.to(out.dtype))

    for name, form, given in (("gram", plain, (None, None)), ("gram scaled", scaled, (draw.spans, draw.scale))):
        arrange = lambda x, out, given=given: (x, *given, out)  # noqa: E731
        work = e * S * d + 4 * d * d, S * d * d
        yield Case(name, f"d={d}", [draw(S, d)], [draw.zeros(d, d)], arrange, form, *work)


def sketch(draw: Draw) -> Iterator[Case]:
    S, d, l, e = draw.size.S, draw.size.d, draw.size.r, draw.dtype.itemsize

    def plain(x: Tensor, omega: Tensor, out: Tensor) -> None:
        z = mm(x, omega).to(out.dtype)
        w = z * draw.squares.to(out.dtype)
        out[:d] += x.to(out.dtype).T @ w
        out[d:] += z.T @ w

    work = e * (S * d + d * l) + 8 * (d + l) * l, 4 * S * d * l + 2 * S * l * l
    inputs, state = [draw(S, d), draw(d, l)], [draw.zeros(d + l, l)]
    yield Case("sketch", f"d={d}", inputs, state, draw.with_spans, plain, *work)


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
        except Exception as problem:  # a form that fails must not cost the others
            record(case.op, form, **work, basis="failed", note=f"{type(problem).__name__}: {str(problem)[:80]}")
            continue
        if error <= ALLOWED:
            errors[form] = error
        else:
            record(case.op, form, **work, error=error, basis="failed", note="wrong: not timed")
    state = [s.clone() for s in case.state]
    runs = {form: (lambda call=forms[form]: call(*case.inputs, *state)) for form in errors}
    taken = in_turn(runs, clock.device, clock.rounds, clock=clock.once)
    plain = taken.get("torch")
    for form, run in runs.items():
        beside = {"plain_ms": plain.median, "ratio": taken[form].median / plain.median} if plain else {}
        beside["peak_mib"] = peak_mib(run, clock.device)
        notes = [clock.host(run)]
        if form == "sst" and clock.device == "cuda":
            from bench.machine import prediction

            at = record.fixed
            notes.append(prediction(case.op, case.width, at["batch"], at["length"], at["rank"]))
        record(case.op, form, taken[form], **work | beside, error=errors[form], note="; ".join(filter(None, notes)))


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
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--ops", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--out", type=Path, help="default: bench/results/ops_<device>.csv; rows are appended")
    options = parser.parse_args(arguments)
    out = options.out or ROOT / "bench/results" / f"ops_{device}.csv"
    modules, dtype = (224, torch.bfloat16) if device == "cuda" else (28, torch.float32)
    ceilings = measure_ceilings(device, dtype, Recorder(out, device))
    clock, compiled = Clock(device, 15), set()
    for op in options.ops:
        for size in sizes(op, device, modules, options.quick):
            for case in CASES[op](Draw(size, device, dtype)):
                record = Recorder(out, device, model=case.width, rank=size.r, batch=size.B, length=size.T)
                forms: dict[str, Callable[..., object]] = {"sst": case.call, "torch": case.plain}
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
