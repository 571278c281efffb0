"""Every op against its fp64 definition, in three forms: the CPU form, the kernel interpreted, the kernel on a GPU."""

import functools
import importlib
import itertools
import mmap
import os

import pytest
import torch

from sst_kernels import ops
from sst_kernels.ops.sketch.op import rounded
from sst_kernels.testing import assert_close, poisoned, tolerance

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number; Python has the name from 3.13 on
OPS = ("core_outer", "factor_rows", "factor_moments", "gram", "sketch", "eigen_moments")
FORMS = ("cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu))
# Every layout in the dtype of models, every dtype in the layout that is hardest on block boundaries.
CASES = [(layout, torch.bfloat16) for layout in ("dense", "right", "left", "packed")]
CASES += [("packed", torch.float32), ("packed", torch.float16)]

reference = {op: getattr(importlib.import_module(f"sst_kernels.ops.{op}.reference"), op) for op in OPS}


def run(op, form, *args, **options):
    """The op on its arguments, results on the CPU in place; `interpreter` calls the launcher on CPU tensors."""
    if form == "interpreter":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("triton was imported to compile; set TRITON_INTERPRET=1")
        launcher = getattr(importlib.import_module(f"sst_kernels.ops.{op}.kernel"), op)
        launcher(*args, "ieee", **options)
    elif form == "cpu":
        getattr(ops, op)(*args, **options)
    else:
        move = lambda a: [t.cuda() for t in a] if isinstance(a, list) else a.cuda() if torch.is_tensor(a) else a  # noqa: E731
        moved, named = [move(a) for a in args], {name: move(a) for name, a in options.items()}
        getattr(ops, op)(*moved, precision="ieee", **named)
        for a, b in zip((*args, *options.values()), (*moved, *named.values())):
            if torch.is_tensor(a):
                a.copy_(b)


def spans_of(layout):
    """(S, spans): boundaries fall inside token blocks, samples are empty, one token long, or longer than a block."""
    if layout == "dense":
        return 60, ops.spans_from_lengths(3, 20)
    if layout == "right":
        return 120, ops.spans_from_lengths(3, 40, torch.tensor([40, 0, 33]))
    if layout == "left":
        return 120, ops.spans_from_lengths(3, 40, torch.tensor([1, 39, 35]), padding="left")
    return 150, ops.spans_from_cu_seqlens(torch.tensor([0, 5, 5, 6, 75, 150]))


def data(seed, S, *widths, dtype, spans=None, strided=False):
    """Token matrices [S, w]; padding tokens are NaN, so that reading one shows; `strided` takes views of wider ones."""
    g = torch.Generator().manual_seed(seed)
    covered = torch.zeros(S, dtype=torch.bool)
    for begin, end in [(0, S)] if spans is None else spans.tolist():
        covered[begin:end] = True
    out = []
    for w in widths:
        x = torch.randn(S, w + 3 * strided, generator=g)
        x[~covered] = float("nan")
        out.append(x.to(dtype)[:, 2 * strided : w + 2 * strided])
    return out


def scales(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.5


def lies_below(sketch, lower, length):
    """Y C⁺ Yᵀ ⪯ F but for the rounding of float32 sums, whatever W was rounded to: [[F, Y], [Yᵀ, C]] is positive semi-definite."""
    d = len(lower)
    whole = torch.zeros(len(sketch), len(sketch), dtype=torch.float64)
    whole[:d, :d], whole[d:, :d], whole[d:, d:] = lower, sketch[:d].T, sketch[d:]
    values = torch.linalg.eigvalsh(whole)
    assert values[0] >= -tolerance(length) * values[-1]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch):
    """Workspace that a launcher allocates starts as NaN: what a kernel reads, a kernel must have written."""
    empty = torch.empty

    @functools.wraps(empty)
    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=lambda c: str(c).removeprefix("torch."))
class TestAgainstDefinition:
    def test_core_outer(self, form, layout, dtype):
        S, spans = spans_of(layout)
        shapes = [(4, 4), (8, 5), (4, 4), (17, 33)]
        lefts = data(0, S, *(p for p, _ in shapes), dtype=dtype, spans=spans)
        rights = data(1, S, *(q for _, q in shapes), dtype=dtype, spans=spans)
        scale = scales(len(spans))
        wide = poisoned(len(spans), sum(p * q for p, q in shapes) + 7)
        out = wide[:, :-7]
        run("core_outer", form, lefts, rights, spans, scale, out)
        assert_close("core_outer", out, reference["core_outer"](lefts, rights, spans, scale), tolerance(S))
        assert wide[:, -7:].isnan().all()

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
    def test_factor_rows(self, form, layout, dtype, stored):
        S, spans = spans_of(layout)
        left, right = data(2, S, 5, 67, dtype=dtype, spans=spans, strided=layout == "left")
        out = poisoned(len(spans), 5 * 67, dtype=stored)
        run("factor_rows", form, left, right, spans, scales(len(spans)), out)
        expected = reference["factor_rows"](left, right, spans, scales(len(spans)))
        assert_close("factor_rows", out, expected, tolerance(S, stored=stored))

    @pytest.mark.parametrize("shape", [(6, 81), (81, 6)])
    def test_factor_moments(self, form, layout, dtype, shape):
        S, spans = spans_of(layout)
        left, right = data(3, S, *shape, dtype=dtype, spans=spans, strided=layout == "packed")
        start = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
        total, square = start.clone()
        run("factor_moments", form, left, right, spans, scales(len(spans)), total, square)
        expected = reference["factor_moments"](left, right, spans, scales(len(spans)))
        assert_close("factor_moments sum", total, start[0] + expected[0], tolerance(S))
        assert_close("factor_moments sumsq", square, start[1] + expected[1], tolerance(S))
        alone = start[1].clone()
        run("factor_moments", form, left, right, spans, None, None, alone)
        expected = reference["factor_moments"](left, right, spans)
        assert_close("factor_moments sumsq alone", alone, start[1] + expected[1], tolerance(S))

    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
    def test_gram(self, form, layout, dtype, scaled):
        S, spans = spans_of(layout)
        (x,) = data(4, S, 141, dtype=dtype, spans=spans, strided=layout == "right")
        scale = scales(len(spans)) if scaled else None
        start = torch.randn(141, 141, generator=torch.Generator().manual_seed(6))
        out = start.tril() + poisoned(141, 141).triu(1)
        run("gram", form, x, spans, scale, out)
        assert_close("gram", out.tril(), start.tril() + reference["gram"](x, spans, scale), tolerance(S))

    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
    def test_sketch(self, form, layout, dtype, scaled):
        S, spans = spans_of(layout)
        (x,) = data(7, S, 141, dtype=dtype, spans=spans, strided=layout == "right")
        omega = torch.randn(141, 11, generator=torch.Generator().manual_seed(8))
        scale = scales(len(spans)) if scaled else None
        for test in (omega, omega.to(dtype)):
            out, trace = torch.ones(152, 11), torch.ones((), dtype=torch.float64)
            run("sketch", form, x, test, spans, scale, out, trace=trace)
            allowed = tolerance(S + 141, stored=rounded(dtype))
            assert_close("sketch", out, 1 + reference["sketch"](x, test, spans, scale), allowed)
            assert_close("trace", trace, 1 + reference["gram"](x, spans, scale).trace(), tolerance(S + 141))
            alone = torch.ones(152, 11)
            run("sketch", form, x, test, spans, scale, alone)
            assert torch.equal(alone, out)
            lies_below(out - 1, reference["gram"](x, spans, scale), S + 141)

    @pytest.mark.parametrize("shape", [(6, 37), (37, 6)])
    def test_eigen_moments(self, form, layout, dtype, shape):
        S, spans = spans_of(layout)
        left, right = data(9, S, *shape, dtype=dtype, spans=spans)
        g = torch.Generator().manual_seed(10)
        u_left, u_right = torch.randn(shape[0], 6, generator=g), torch.randn(shape[1], 5, generator=g)
        out = torch.ones(6, 5)
        run("eigen_moments", form, left, right, spans, scales(len(spans)), u_left, u_right, out)
        expected = 1 + reference["eigen_moments"](left, right, spans, scales(len(spans)), u_left, u_right)
        assert_close("eigen_moments", out, expected, tolerance(S + sum(shape)))


@pytest.mark.parametrize("form", FORMS)
def test_spans_none_means_every_token(form):
    (x,) = data(11, 77, 45, dtype=torch.bfloat16)
    out = torch.zeros(45, 45)
    run("gram", form, x, None, None, out)
    assert_close("gram of all tokens", out.tril(), reference["gram"](x), tolerance(77))
    omega, y = torch.randn(45, 4, generator=torch.Generator().manual_seed(12)), torch.zeros(49, 4)
    run("sketch", form, x, omega, None, None, y)
    assert_close("sketch of all tokens", y, reference["sketch"](x, omega), tolerance(77, stored=torch.bfloat16))
    lies_below(y, reference["gram"](x), 122)


@pytest.mark.parametrize("op", OPS)
def test_offsets_beyond_int32(op):
    """Rows 2³⁰ elements apart, in memory that nothing touches between them: an offset of 32 bits would miss the third."""
    apart, rows = 1 << 30, 3

    def far(width, dtype, rows=rows):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        memory = mmap.mmap(-1, ((rows - 1) * apart + width) * dtype.itemsize, flags=flags)
        return torch.frombuffer(memory, dtype=dtype).as_strided((rows, width), (apart, 1))

    g = torch.Generator().manual_seed(20)
    x, near = far(20, torch.bfloat16), torch.randn(rows, 5, generator=g).bfloat16()
    x.copy_(torch.randn(rows, 20, generator=g))
    spans, scale = torch.tensor([[0, 1], [1, 1], [1, 3]]), scales(3)
    omega, u_left, u_right = (torch.randn(*s, generator=g) for s in ((20, 4), (5, 5), (20, 4)))
    args, out = {
        "core_outer": (([near], [x.clone()], spans, scale), far(100, torch.float32)),
        "factor_rows": ((near, x, spans, scale), far(100, torch.float32)),
        "factor_moments": ((near, x, spans, scale, None), torch.zeros(5, 20)),
        "gram": ((x, spans, scale), torch.zeros(20, 20)),
        "sketch": ((x, omega, spans, scale), far(4, torch.float32, 24)),
        "eigen_moments": ((near, x, spans, scale, u_left, u_right), torch.zeros(5, 4)),
    }[op]
    run(op, "interpreter", *args, out)
    expected = reference[op](*(a for a in args if a is not None))
    stored = torch.bfloat16 if op == "sketch" else torch.float32
    out = out.tril() if op == "gram" else out
    assert_close(op, out, expected[1] if op == "factor_moments" else expected, tolerance(40, stored=stored))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sketches_lie_below_what_they_sketch(form, dtype):
    """Also where a few coordinates are a thousand times larger than the rest, samples differ in scale, and one counts nothing;
    many batches in one sum. With ΩᵀY for a core, rounding W would miss this."""
    g = torch.Generator().manual_seed(21)
    spans = ops.spans_from_cu_seqlens(torch.tensor([0, 30, 31, 90, 150]))
    omega = 2.0 * torch.randint(0, 2, (40, 24), generator=g) - 1
    out, whole = torch.zeros(64, 24), torch.zeros(40, 40, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(150, 40, generator=g) * torch.logspace(0, -2, 40)
        x[:, 3] *= 1000
        scale, x = torch.tensor([0.3, 0.0, 5.0, 1.7]), x.to(dtype)
        run("sketch", form, x, omega.to(dtype), spans, scale, out)
        whole += reference["gram"](x, spans, scale)
    lies_below(out, whole, 3 * 190)
    if dtype == torch.bfloat16:
        without = torch.cat([out[:40], omega.T @ out[:40]])
        with pytest.raises(AssertionError):
            lies_below(without, whole, 3 * 190)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("samples", ["all", "long", "tokens"])
def test_gram_of_few_tiles_splits_its_tokens(form, samples):
    """600 tokens of 20 numbers: one tile, so its tokens, or whole samples, are spread over parts."""
    (x,) = data(16, 600, 20, dtype=torch.bfloat16)
    cuts = {"all": None, "long": torch.tensor([0, 90, 90, 300, 590, 600]), "tokens": torch.arange(601)}[samples]
    spans = None if cuts is None else ops.spans_from_cu_seqlens(cuts)
    for scale in (None, *([] if cuts is None else [scales(len(spans))])):
        start = torch.randn(20, 20, generator=torch.Generator().manual_seed(17))
        out = start.tril() + poisoned(20, 20).triu(1)
        run("gram", form, x, spans, scale, out)
        assert_close("split gram", out.tril(), start.tril() + reference["gram"](x, spans, scale), tolerance(600))


def test_plans_fill_the_processors():
    """Parts cover what they split exactly, and there are as many programs as processors where the tokens allow."""
    from sst_kernels.ops.gram.kernel import plan, plan_parts
    from sst_kernels.ops.tiles import Chip

    chip = Chip()
    for d, S, N in itertools.product((16, 128, 256, 576, 4096), (1, 300, 4096), (None, 1, 8)):
        meta = plan(d, False, False, False, chip)
        part, parts = plan_parts(d, S, N, meta, chip)
        whole = S if N is None else N
        assert (parts - 1) * part < whole <= parts * part
        tiles = -(-d // meta["BD"]) * (-(-d // meta["BD"]) + 1) // 2
        assert parts == 1 or tiles * parts <= chip.processors
        if N is None and S == 4096:
            assert tiles * parts > min(chip.processors // 2, 15)


@pytest.mark.parametrize("form", FORMS)
def test_token_samples(form):
    """Samples of one token: rank-one gradients, more samples than a block holds, rotated token by token."""
    left, right = data(13, 40, 5, 19, dtype=torch.bfloat16)
    spans = torch.stack([torch.arange(40), torch.arange(40) + 1], 1)
    total, square = torch.zeros(2, 5, 19)
    run("factor_moments", form, left, right, spans, scales(40), total, square)
    expected = reference["factor_moments"](left, right, spans, scales(40))
    assert_close("token sum", total, expected[0], tolerance(40))
    assert_close("token sumsq", square, expected[1], tolerance(40))
    u_left, u_right = torch.eye(5), torch.eye(19).flip(0)
    G = torch.zeros(19, 19)
    run("gram", form, right, spans, scales(40), G)
    assert_close("token gram", G.tril(), reference["gram"](right, spans, scales(40)), tolerance(40))
    out = torch.zeros(5, 19)
    run("eigen_moments", form, left, right, spans, scales(40), u_left, u_right, out)
    assert_close("token eigen moments", out, expected[1].flip(1), tolerance(40))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", ["factor_moments", "gram"])
def test_many_short_samples(form, op):
    """Samples of nought to three tokens with padding between: too short to walk one by one, not all rank one."""
    lengths = torch.tensor([1, 0, 1] * 11 + [3, 1, 2] * 15)
    spans = ops.spans_from_lengths(len(lengths), 3, lengths, padding="left")
    left, right = data(15, 3 * len(lengths), 6, 21, dtype=torch.bfloat16, spans=spans)
    scale = scales(len(spans))
    if op == "gram":
        out = torch.zeros(21, 21)
        run("gram", form, right, spans, scale, out)
        assert_close("short gram", out.tril(), reference["gram"](right, spans, scale), tolerance(len(right)))
    else:
        total, square = torch.zeros(2, 6, 21)
        run("factor_moments", form, left, right, spans, scale, total, square)
        expected = reference["factor_moments"](left, right, spans, scale)
        assert_close("short sum", total, expected[0], tolerance(len(left)))
        assert_close("short sumsq", square, expected[1], tolerance(len(left)))


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_every_time(form):
    left, right = data(14, 150, 8, 70, dtype=torch.bfloat16)
    _, spans = spans_of("packed")
    first, second = torch.zeros(2, 8, 70), torch.zeros(2, 8, 70)
    for out in (first, second):
        run("factor_moments", form, left, right, spans, None, *out)
    assert torch.equal(first, second)
