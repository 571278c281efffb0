"""What the ops promise beyond values on one batch: registration, compilation, refusals, empty batches, sums of many."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels import ops
from sst_kernels.testing import assert_close, error_ratio, poisoned, tolerance

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
S, P, Q, L = 23, 5, 12, 3


def arguments(device="cpu", dtype=torch.float32):
    """Arguments of every op, precision left out, as the public functions take them."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    left, right = rand(S, P).to(dtype), rand(S, Q).to(dtype)
    spans = torch.tensor([[0, 7], [7, 7], [9, 23]], device=device)
    scale = torch.tensor([0.5, 2.0, 1.5], device=device)
    zeros = lambda *shape: torch.zeros(*shape, device=device)  # noqa: E731
    return {
        "core_outer": ([left, right], [right, left], spans, scale, zeros(3, 2 * P * Q)),
        "factor_rows": (left, right, spans, scale, zeros(3, P * Q)),
        "factor_moments": (left, right, spans, scale, zeros(P, Q), zeros(P, Q)),
        "gram": (right, spans, scale, zeros(Q, Q)),
        "sketch": (right, rand(Q, L), spans, scale, zeros(Q + L, L)),
        "eigen_moments": (left, right, spans, scale, rand(P, P), rand(Q, 4), zeros(P, 4)),
    }


OPS = tuple(arguments())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device):
    traces = [(None,), (torch.zeros((), dtype=torch.float64, device=device),)] if op == "sketch" else [()]
    for trace in traces:
        torch.library.opcheck(getattr(torch.ops.sst_kernels, op).default, (*arguments(device)[op], "ieee", *trace))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_compiles_into_one_graph(op, device):
    eager, compiled = arguments(device)[op], arguments(device)[op]
    getattr(ops, op)(*eager)
    torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")(*compiled)
    assert_close(op, compiled[-1], eager[-1], 0.0)
    assert compiled[-1].any()


@pytest.mark.parametrize("op", OPS)
def test_inputs_may_require_grad(op):
    """Hooks hand over tensors that autograd watches; nothing is differentiated and nothing refused."""
    args = arguments()[op]
    for a in args[0] if isinstance(args[0], list) else args[:1]:
        a.requires_grad_()
    getattr(ops, op)(*args)
    assert not args[-1].requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_no_bits(op, device):
    """Hooks run inside the autocast of a training loop."""
    plain, cast = arguments(device)[op], arguments(device)[op]
    getattr(ops, op)(*plain)
    with torch.autocast(device, dtype=torch.bfloat16):
        getattr(ops, op)(*cast)
    assert torch.equal(cast[-1], plain[-1])
    assert plain[-1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_what_is_written_has_a_new_version(op, device):
    """Autograd and `Memo` go by versions; an op that is called eagerly is not seen by the dispatcher that counts them."""
    *_, out = args = arguments(device)[op]
    versions = [a._version for a in args if torch.is_tensor(a)]
    getattr(ops, op)(*args)
    changed = [a for a, before in zip((a for a in args if torch.is_tensor(a)), versions) if a._version != before]
    assert out is changed[-1]
    assert len(changed) == (2 if op == "factor_moments" else 1)
    assert not out.is_inference()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_empty_batches(op, device):
    """No samples change nothing (or give no rows); samples without tokens add nothing (or give zero rows)."""
    args = arguments(device)[op]
    where = next(i for i, a in enumerate(args) if torch.is_tensor(a) and a.dtype == torch.int64)
    rows = op in ("core_outer", "factor_rows")
    for spans in (args[where][:0], torch.full_like(args[where], 4)):
        out = poisoned(len(spans), args[-1].shape[1], device=device) if rows else torch.ones_like(args[-1])
        sums = tuple(torch.zeros_like(a) for a in args[where + 2 : -1]) if op == "factor_moments" else ()
        middle = sums or args[where + 2 : -1]
        getattr(ops, op)(*args[:where], spans, args[where + 1][: len(spans)], *middle, out)
        assert torch.equal(out, torch.zeros_like(out) if rows else torch.ones_like(out))


def test_no_modules_and_no_tokens():
    spans, scale = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2)
    assert ops.core_outer([], [], spans, scale, torch.empty(2, 0)).shape == (2, 0)
    assert not ops.factor_rows(torch.empty(0, 3), torch.empty(0, 4), spans, scale, poisoned(2, 12)).any()
    assert not ops.gram(torch.empty(0, 3), None, None, torch.zeros(3, 3)).any()


REFUSALS = {
    "tokens of [N, T, d]": ("gram", 0, lambda x: x[None], r"flat tokens \[S, ·\], got \[1, 23, 12\]"),
    "integer tokens": ("gram", 0, lambda x: x.long(), "expected float32, bfloat16 or float16, got torch.int64"),
    "tokens that do not pair": ("factor_rows", 1, lambda x: x[:-1], r"right: expected flat tokens \[23, ·\]"),
    "int32 spans": ("gram", 1, lambda s: s.int(), r"spans: expected \[N, 2\] int64"),
    "a scale too many": ("gram", 2, lambda s: torch.ones(4), r"scale: expected \[3\] float32, got \[4\]"),
    "a float64 accumulator": ("gram", 3, lambda o: o.double(), r"out: expected \[12, 12\] float32, got"),
    "an accumulator transposed": ("sketch", 4, lambda o: torch.zeros(L, Q + L).T, "last dimension contiguous"),
    "rows of another width": ("core_outer", 4, lambda o: o[:, 1:], r"out: expected \[3, 120\]"),
    "spans past the tokens": ("factor_moments", 2, lambda s: s + 1, r"inside \[0, 23\], got 1..24"),
    "a basis of another side": ("eigen_moments", 4, lambda u: u[1:], r"u_left: expected \[5, ·\] float32"),
    "a trace in float32": (
        "sketch",
        "trace",
        lambda _: torch.zeros(()),
        r"trace: expected \[\] float64, got \[\] torch.float32",
    ),
    "a test matrix of another side": ("sketch", 1, lambda o: o[1:], r"omega: expected \[12, l\]"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_was_expected(name):
    op, position, change, message = REFUSALS[name]
    args, options = list(arguments()[op]), {}
    if isinstance(position, str):
        options[position] = change(None)
    else:
        args[position] = change(args[position])
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args, **options)


def test_refuses_scale_without_spans_and_unknown_precision():
    x, out = torch.ones(3, 2), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="no samples to scale"):
        ops.gram(x, None, torch.ones(1), out)
    with pytest.raises(ValueError, match=r"precision: expected one of \('ieee', 'tf32x3', 'tf32'\), got 'bf16'"):
        ops.gram(x, None, None, out, precision="bf16")


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), side=st.sampled_from(["left", "right"]))
@settings(max_examples=40, deadline=None)
def test_padding_and_packing_are_one_case(lengths, side):
    """The same samples, padded on either side or packed, give the same gradients to the last bit."""
    T, N, lengths = 6, len(lengths), torch.tensor(lengths)
    g = torch.Generator().manual_seed(int(lengths.sum()))
    samples = [(torch.randn(n, 3, generator=g), torch.randn(n, 4, generator=g)) for n in lengths]
    padded = ops.spans_from_lengths(N, T, lengths, side)
    left, right = poisoned(N * T, 3), poisoned(N * T, 4)
    for (a, b), (begin, end) in zip(samples, padded.tolist()):
        left[begin:end], right[begin:end] = a, b
    packed = ops.spans_from_cu_seqlens(torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))
    rows = [
        ops.factor_rows(*tokens, None, poisoned(N, 12))
        for tokens in ((left, right, padded), (*(torch.cat(t) for t in zip(*samples)), packed))
    ]
    assert torch.equal(*rows)


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_moments_are_the_sums_of_the_rows(tokens, samples, seed):
    """Σ G, Σ G² and the rotated squares agree with the rows themselves; the Gram matrix is positive semi-definite."""
    g = torch.Generator().manual_seed(seed)
    left, right = torch.randn(tokens, P, generator=g), torch.randn(tokens, Q, generator=g)
    spans = torch.randint(0, tokens + 1, (samples, 2), generator=g).sort(1).values
    rows = ops.factor_rows(left, right, spans, None, poisoned(samples, P * Q)).view(samples, P, Q)
    total, square, rotated = torch.zeros(P, Q), torch.zeros(P, Q), torch.zeros(P, Q)
    ops.factor_moments(left, right, spans, None, total, square)
    ops.eigen_moments(left, right, spans, None, torch.eye(P).flip(1), torch.eye(Q), rotated)
    allowed = tolerance(tokens * samples)
    assert (total - rows.sum(0)).abs().max() <= allowed * (rows.abs().sum(0).max() + 1)
    assert error_ratio(square, rows.square().sum(0)) <= allowed
    assert error_ratio(rotated, square.flip(0)) <= allowed
    F = ops.symmetrize_(ops.gram(right, spans, None, torch.zeros(Q, Q))).double()
    assert torch.linalg.eigvalsh(F)[0] >= -allowed * F.trace()


def test_symmetrize_in_blocks():
    lower = torch.randn(1100, 1100).tril()
    assert torch.equal(ops.symmetrize_(lower + poisoned(1100, 1100).triu(1)), lower + lower.tril(-1).T)


@pytest.mark.parametrize("device", DEVICES)
def test_ten_thousand_batches(device):
    """Sums over 10 000 bfloat16 batches stay within 1e-5 of float64: products are exact, one rounding per batch."""
    batches, T, d = 10_000, 4, 8
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(batches, T, d, generator=g) + 0.5).bfloat16().to(device)
    spans = ops.spans_from_lengths(2, T // 2, device=device)
    gram, total, square = torch.zeros(3, d, d, device=device)
    for tokens in x:
        ops.gram(tokens, None, None, gram)
        ops.factor_moments(tokens, tokens, spans, None, total, square)
    x = x.double()
    G = x.view(2 * batches, T // 2, d).mT @ x.view(2 * batches, T // 2, d)
    assert_close("gram", gram.tril(), G.sum(0).tril(), 1e-5)
    assert_close("sum", total, G.sum(0), 1e-5)
    assert_close("sumsq", square, G.square().sum(0), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["factor_rows", "gram", "sketch"])
def test_offsets_beyond_int32(op):
    """Inputs of more than 2³¹ elements: the last tokens must count as the first ones do."""
    d = 65536 if op != "gram" else 1024
    S = 2**31 // d + 40
    x = torch.zeros(S, d, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.randn(3, d, device="cuda").bfloat16()
    tail = x[-3:].double()
    if op == "factor_rows":
        left = torch.ones(S, 4, dtype=torch.bfloat16, device="cuda")
        spans = torch.tensor([[0, S - 2], [S - 2, S]], device="cuda")
        out = ops.factor_rows(left, x, spans, None, poisoned(2, 4 * d, device="cuda"))
        expected = torch.stack([tail[:1].sum(0), tail[1:].sum(0)]).repeat(1, 4)
    elif op == "gram":
        out = ops.gram(x, None, None, torch.zeros(d, d, device="cuda")).tril()
        expected = (tail.T @ tail).tril()
    else:
        omega = torch.randn(d, 16, device="cuda")
        out = ops.sketch(x, omega, None, None, torch.zeros(d + 16, 16, device="cuda"))
        z = tail @ omega.double()
        expected = torch.cat([tail.T @ z, z.T @ z])
    stored = torch.bfloat16 if op == "sketch" else torch.float32
    assert_close(op, out, expected, tolerance(d, stored=stored))


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "precision"), list(itertools.product(OPS, ["ieee", "tf32x3"])))
def test_float32_precision_on_tensor_cores(op, precision):
    """float32 inputs keep float32 accuracy under both precisions that promise it."""
    g = torch.Generator("cuda").manual_seed(3)
    rand = lambda *shape: torch.randn(*shape, generator=g, device="cuda")  # noqa: E731
    left, right, scale = rand(700, 16), rand(700, 300), rand(3).abs() + 0.5
    spans = torch.tensor([[0, 300], [300, 301], [310, 700]], device="cuda")
    zeros = lambda *shape: torch.zeros(*shape, device="cuda")  # noqa: E731
    args = {
        "core_outer": ([left], [left], spans, scale, zeros(3, 256)),
        "factor_rows": (left, right, spans, scale, zeros(3, 4800)),
        "factor_moments": (left, right, spans, scale, None, zeros(16, 300)),
        "gram": (right, spans, scale, zeros(300, 300)),
        "sketch": (right, rand(300, 20), spans, scale, zeros(320, 20)),
        "eigen_moments": (left, right, spans, scale, rand(16, 16), rand(300, 300), zeros(16, 300)),
    }[op]
    getattr(ops, op)(*args, precision=precision)
    reference = getattr(importlib.import_module(f"sst_kernels.ops.{op}.reference"), op)
    expected = (
        reference(*args[:4], *args[4:-1]) if op == "eigen_moments" else reference(*args[: 4 if op != "gram" else 3])
    )
    if op == "factor_moments":
        expected = expected[1]
    assert_close(op, args[-1].tril() if op == "gram" else args[-1], expected, 4 * tolerance(1000))
