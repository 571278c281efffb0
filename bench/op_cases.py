"""What `bench/ops.py` measures: each op at one size, the same in torch, and the least it must move and compute."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_kernels import ops


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
    """One op on fixed `inputs`: `call` and `plain` (the torch form) take them and the `state` tensors they write to."""

    op: str
    width: str
    inputs: list[Tensor]
    state: list[Tensor]
    call: Callable[..., object]
    plain: Callable[..., object]
    bytes: int
    flops: int
    tuned: Callable[..., object] | None = None
    candidates: tuple[dict[str, int], ...] = ()


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


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Product with float32 result: of bfloat16 operands without widening them where torch can."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        return (torch.bmm if a.ndim == 3 else torch.mm)(a, b, out_dtype=torch.float32)
    return (a if a.dtype == torch.float64 else a.float()) @ (b if b.dtype == torch.float64 else b.float())


def grid(**choices: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    return tuple(dict(zip(choices, values)) for values in itertools.product(*choices.values()))


def narrow_tiles(p: int, q: int, wide: tuple[int, ...], warps: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    """Candidates for the factor kernels: the narrow side whole, the wide side at several tile widths."""
    narrow = {"BP" if p <= q else "BQ": max(16, min(64, 1 << (min(p, q) - 1).bit_length()))}
    side = "BQ" if p <= q else "BP"
    return tuple(narrow | c for c in grid(**{side: wide}, BT=(64, 128), num_warps=warps, num_stages=(3, 4)))


def kernel(op: str, function: str | None = None) -> Callable[..., object]:
    """The launcher of an op, which takes configurations; imported late, since it needs Triton."""
    return getattr(importlib.import_module(f"sst_kernels.ops.{op}.kernel"), function or op)


def core_outer(draw: Draw) -> Iterator[Case]:
    size, e = draw.size, draw.dtype.itemsize
    S, r, m = size.S, size.r, size.modules

    def plain(*args: Tensor) -> None:
        *tokens, out = args
        for i in range(m):
            out[:, i * r * r : (i + 1) * r * r] = draw.gradients(tokens[i], tokens[m + i], out).flatten(1)

    yield Case(
        "core_outer",
        f"{m} modules",
        [draw(S, r) for _ in range(2 * m)],
        [draw.zeros(size.B, m * r * r)],
        lambda *a: ops.core_outer(a[:m], a[m:-1], draw.spans, draw.scale, a[-1]),
        plain,
        2 * e * m * S * r + 4 * size.B * m * r * r,
        2 * m * S * r * r,
        lambda *a, **c: kernel("core_outer")(a[:m], a[m:-1], draw.spans, draw.scale, a[-1], "ieee", **c),
        grid(BT=(32, 64, 128), num_warps=(1, 2, 4), num_stages=(2, 4)),
    )


def factor_rows(draw: Draw) -> Iterator[Case]:
    size, e = draw.size, draw.dtype.itemsize
    for name, p, q in (("factor_rows A", size.r, size.d), ("factor_rows B", size.d, size.r)):
        yield Case(
            name,
            f"d={size.d}",
            [draw(size.S, p), draw(size.S, q)],
            [draw.zeros(size.B, p * q)],
            lambda left, right, out: ops.factor_rows(left, right, draw.spans, draw.scale, out),
            lambda left, right, out: out.copy_(draw.gradients(left, right, out).flatten(1)),
            e * size.S * (p + q) + 4 * size.B * p * q,
            2 * size.S * p * q,
            lambda left, right, out, **c: kernel("factor_rows")(left, right, draw.spans, draw.scale, out, "ieee", **c),
            narrow_tiles(p, q, (32, 64, 128), (4,)),
        )


def factor_moments(draw: Draw) -> Iterator[Case]:
    size, e = draw.size, draw.dtype.itemsize

    def plain(left: Tensor, right: Tensor, total: Tensor, square: Tensor) -> None:
        G = draw.gradients(left, right, square)
        total += G.sum(0)
        square += G.square().sum(0)

    for name, p, q in (("factor_moments A", size.r, size.d), ("factor_moments B", size.d, size.r)):
        yield Case(
            name,
            f"d={size.d}",
            [draw(size.S, p), draw(size.S, q)],
            [draw.zeros(p, q), draw.zeros(p, q)],
            lambda left, right, *sums: ops.factor_moments(left, right, draw.spans, draw.scale, *sums),
            plain,
            e * size.S * (p + q) + 16 * p * q,
            2 * size.S * p * q,
            lambda left, right, *o, **c: kernel("factor_moments")(left, right, draw.spans, draw.scale, *o, "ieee", **c),
            narrow_tiles(p, q, (16, 32, 64), (2, 4)),
        )


def gram(draw: Draw) -> Iterator[Case]:
    size, e = draw.size, draw.dtype.itemsize
    S, d = size.S, size.d

    def plain(x: Tensor, out: Tensor) -> None:
        out += mm(x.T, x)

    def scaled(x: Tensor, out: Tensor) -> None:
        out += mm(x.T.to(out.dtype) * draw.squares.T.to(out.dtype), x.to(out.dtype))

    common = {"bytes": e * S * d + 4 * d * d, "flops": S * d * d}
    yield Case(
        "gram",
        f"d={d}",
        [draw(S, d)],
        [draw.zeros(d, d)],
        lambda x, out: ops.gram(x, None, None, out),
        plain,
        **common,
        tuned=lambda x, out, **c: kernel("gram")(x, None, None, out, "ieee", **c),
        candidates=(
            *grid(BD=(128,), BT=(64,), num_warps=(4, 8), num_stages=(3, 4)),
            {"BD": 128, "BT": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128},
            {"BD": 128, "BT": 32, "num_warps": 4, "num_stages": 5},
            {"BD": 128, "BT": 32, "num_warps": 8, "num_stages": 5},
            {"BD": 128, "BT": 128, "num_warps": 8, "num_stages": 2},
            {"BD": 256, "BT": 32, "num_warps": 8, "num_stages": 3},
            {"BD": 64, "BT": 128, "num_warps": 4, "num_stages": 3},
        ),
    )
    yield Case(
        "gram scaled",
        f"d={d}",
        [draw(S, d)],
        [draw.zeros(d, d)],
        lambda x, out: ops.gram(x, draw.spans, draw.scale, out),
        scaled,
        **common,
        tuned=lambda x, out, **c: kernel("gram")(x, draw.spans, draw.scale, out, "ieee", **c),
        candidates=grid(BD=(64, 128), BT=(32, 64, 128), num_warps=(8,), num_stages=(3, 4)),
    )


def sketch(draw: Draw) -> Iterator[Case]:
    size, e = draw.size, draw.dtype.itemsize
    S, d, l = size.S, size.d, size.r

    def plain(x: Tensor, omega: Tensor, out: Tensor) -> None:
        z = mm(x, omega).to(out.dtype)
        w = z * draw.squares.to(out.dtype)
        out[:d] += x.to(out.dtype).T @ w
        out[d:] += z.T @ w

    yield Case(
        "sketch",
        f"d={d}",
        [draw(S, d), draw(d, l)],
        [draw.zeros(d + l, l)],
        lambda x, omega, out: ops.sketch(x, omega, draw.spans, draw.scale, out),
        plain,
        e * (S * d + d * l) + 8 * (d + l) * l,
        4 * S * d * l + 2 * S * l * l,
        lambda x, omega, out, **c: kernel("sketch")(x, omega, draw.spans, draw.scale, out, "ieee", **c),
        grid(BD=(32, 64, 128), BT=(32, 64), num_warps=(4, 8)),
    )
    if draw.device != "cuda":
        return

    def project(x: Tensor, u: Tensor, out: Tensor, **config: int) -> None:
        out.copy_(kernel("sketch", "project")(x, u, "tf32x3", **config))

    for name, rows, columns, dtype in (
        ("project bf16", S, l, torch.bfloat16),
        ("project rotate", size.B * l, d, torch.float32),
    ):
        yield Case(
            name,
            f"d={d}",
            [draw(rows, d, dtype=dtype), draw(d, columns, dtype=dtype)],
            [draw.zeros(rows, columns)],
            project,
            lambda x, u, out: out.copy_(mm(x, u)),
            dtype.itemsize * (rows * d + d * columns) + 4 * rows * columns,
            2 * rows * d * columns,
            project,
            grid(parts=(1, 2, 4), BT=(64, 128), BD=(32, 64), BL=(32, 64), num_warps=(4,), num_stages=(3,)),
        )


def eigen_moments(draw: Draw) -> Iterator[Case]:
    size, e = draw.size, draw.dtype.itemsize
    S, p, q = size.S, size.r, size.d

    def plain(left: Tensor, right: Tensor, u_left: Tensor, u_right: Tensor, out: Tensor) -> None:
        out += (u_left.T @ draw.gradients(left, right, out) @ u_right).square().sum(0)

    yield Case(
        "eigen_moments",
        f"d={q}",
        [
            draw(S, p),
            draw(S, q),
            torch.linalg.qr(draw(p, p, dtype=torch.float32))[0],
            draw(q, q, dtype=torch.float32) / q**0.5,
        ],
        [draw.zeros(p, q)],
        lambda left, right, u_left, u_right, out: ops.eigen_moments(
            left, right, draw.spans, draw.scale, u_left, u_right, out
        ),
        plain,
        e * S * (p + q) + 4 * (p * p + q * q) + 8 * p * q,
        2 * min(S * q * q + S * p * q, S * p * q + size.B * p * q * q),
    )


CASES = {f.__name__: f for f in (core_outer, factor_rows, factor_moments, gram, sketch, eigen_moments)}
