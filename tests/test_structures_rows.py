"""Structures made of per-sample rows: `full`, and Frequent Directions with its certificate; blocks of joint ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels.fisher.base import Counts, TokenBatch
from sst_kernels.fisher.structures import RowBuffer, make_structure
from tests.structure_cases import SHAPE, batch, exact, samples


def spectrum_rows(n: int, width: int, decay: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(width, width, generator=g))[0] * decay ** torch.arange(width)
    return torch.randn(n, width, generator=g) @ mix.mT


def rows_batch(rows: torch.Tensor) -> TokenBatch:
    """What the accumulator hands to a joint structure: rows, and no tokens."""
    n, nothing = len(rows), rows.new_empty(0, 1)
    return TokenBatch(nothing, nothing, torch.zeros(n, 2, dtype=torch.int64), torch.ones(n), Counts(n, n, n), rows=rows)


def test_full_is_exact_and_keeps_the_order():
    data = samples(9)
    structure = make_structure("full", SHAPE)
    structure.update(batch(data[:4])), structure.update(batch(data[4:], "left"))
    expected = torch.stack([s.gradient() for s in data])
    torch.testing.assert_close(structure.rows.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(structure.dense(), exact(data), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [14, 15, 16, 61])
def test_folding_is_exact_and_bounded(n):
    data = samples(n)
    structure = make_structure("full", SHAPE, rows="fold")
    for one in data:
        structure.update(batch([one]))
    assert structure.folded == (n > structure.size)
    assert structure.nbytes <= 12 * structure.size**2
    torch.testing.assert_close(structure.dense(), exact(data), rtol=1e-5, atol=1e-5)
    if structure.folded:
        with pytest.raises(RuntimeError, match='rows="keep"'):
            _ = structure.rows
        with pytest.raises(ValueError, match="keeps its rows"):
            structure.block(0, SHAPE)


def test_folding_rounds_like_float64():
    """Rows of sizes 1 to 1e4 fold to their float64 Gram: a float32 one would be 1e-7 off."""
    rows = torch.randn(70, SHAPE[0] * SHAPE[1]) * torch.logspace(0, 4, 70)[:, None]
    structure = make_structure("full", SHAPE, rows="fold")
    for part in rows.split(7):
        structure.append(part)
    structure.counts += Counts(70, 70, 70)
    assert structure.folded
    expected = rows.double().mT @ rows.double() / 70
    torch.testing.assert_close(structure.dense(), expected, rtol=0, atol=1e-15 * 70 * float(expected.abs().max()))


def test_folded_and_unfolded_parts_merge():
    data = samples(40)
    parts = []
    for part in (data[:30], data[30:]):
        parts.append(make_structure("full", SHAPE, rows="fold"))
        for one in part:
            parts[-1].update(batch([one]))
    assert [p.folded for p in parts] == [True, False]
    for first, second in (parts, parts[::-1]):
        total = make_structure("full", SHAPE, rows="fold")
        total.merge(first), total.merge(second)
        torch.testing.assert_close(total.dense(), exact(data), rtol=1e-5, atol=1e-5)


def test_row_buffer_grows_by_doubling_and_keeps_its_rows():
    buffer = RowBuffer(3)
    moves, place = 0, None
    for i in range(100):
        buffer.extend(1).fill_(i)
        moves += buffer.rows.data_ptr() != place
        place = buffer.rows.data_ptr()
    assert moves <= 8
    assert torch.equal(buffer.rows, torch.arange(100.0)[:, None].expand(-1, 3))
    buffer = RowBuffer(3)
    buffer.reserve(10)
    buffer.append(torch.ones(1, 3))
    place = buffer.rows.data_ptr()
    buffer.append(torch.ones(9, 3))
    assert buffer.rows.data_ptr() == place


JOINT = {"full": {}, "lowrank": {"rank": 4}, "diagonal": {}, "diagonal-centred": {"centred": True}, "vila": {}}


@pytest.mark.parametrize("kind", JOINT)
def test_joint_structures_take_rows_and_give_blocks(kind):
    rows = torch.randn(11, 23, generator=torch.Generator().manual_seed(0))
    joint = make_structure(kind.split("-")[0], (23, 1), **JOINT[kind])
    joint.update(rows_batch(rows[:6])), joint.update(rows_batch(rows[6:]))
    offset = 0
    for shape in ((2, 3), (4, 4), (1, 1)):
        columns = slice(offset, offset + shape[0] * shape[1])
        block = joint.block(offset, shape)
        assert block.shape == shape
        assert block.counts == joint.counts
        torch.testing.assert_close(block.dense(), joint.dense()[columns, columns], rtol=1e-12, atol=1e-12)
        offset = columns.stop
    with pytest.raises(ValueError, match="outside"):
        joint.block(20, (2, 2))
    if kind in ("full", "lowrank"):
        with pytest.raises(RuntimeError, match="update the joint"):
            joint.block(0, (2, 3)).update(batch(samples(1, (2, 3))))


def certificate_holds(sketch, rows: torch.Tensor) -> None:
    """−rounding·I ⪯ F − F̃ ⪯ Δ·I, on the raw sums and on the normalised scale."""
    f = rows.double().mT @ rows.double()
    noise = 1e-14 * float(torch.linalg.matrix_norm(f, 2))
    raw = torch.linalg.eigvalsh(f - sketch.rows.double().mT @ sketch.rows.double())
    assert raw.min() >= -float(sketch._rounding) - noise
    assert raw.max() <= float(sketch._shrinkage + sketch._rounding) + noise
    normalised = torch.linalg.eigvalsh(f / sketch.normaliser - sketch.dense())
    assert normalised.min() >= -sketch.rounding - noise / sketch.normaliser
    assert normalised.max() <= sketch.certificate + noise / sketch.normaliser


def frequent_directions_bound(rows: torch.Tensor, rank: int) -> float:
    """min_k ‖A − A_k‖²_F / (ℓ + 1 − k): Ghashami et al., theorem 1.1, for a reduction that keeps ℓ rows."""
    squares = torch.linalg.svdvals(rows.double()).square()
    tails = squares.flip(0).cumsum(0).flip(0)
    return min(float(tails[k] if k < len(tails) else 0) / (rank + 1 - k) for k in range(rank + 1))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 90),
    width=st.integers(1, 24),
    rank=st.integers(1, 16),
    decay=st.sampled_from([0.3, 0.8, 1.0]),
    size=st.sampled_from([1e-3, 1.0, 1e5]),
    pieces=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_certificate(n, width, rank, decay, size, pieces, seed):
    rows = size * spectrum_rows(n, width, decay, seed)
    sketch = make_structure("lowrank", (width, 1), rank=rank)
    for part in rows.tensor_split(pieces):
        sketch.update(rows_batch(part))
    assert len(sketch.rows) <= 2 * rank
    certificate_holds(sketch, rows)
    bound = frequent_directions_bound(rows, rank)
    assert float(sketch._shrinkage) <= bound + 1e-5 * float(rows.double().square().sum())
    if n <= 2 * rank or rank >= width:
        assert float(sketch._shrinkage) <= 1e-12 * float(rows.double().square().sum())


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 80), cut=st.floats(0, 1), rank=st.integers(1, 8), seed=st.integers(0, 99))
def test_certificates_add_when_sketches_merge(n, cut, rank, seed):
    rows, at = spectrum_rows(n, 12, 0.8, seed), int(cut * n)
    parts = [make_structure("lowrank", (12, 1), rank=rank) for _ in range(2)]
    parts[0].update(rows_batch(rows[:at])), parts[1].update(rows_batch(rows[at:]))
    parts[0].merge(parts[1])
    certificate_holds(parts[0], rows)
    parts[0].compress()
    assert len(parts[0].rows) <= max(rank, min(n, rank))
    certificate_holds(parts[0], rows)


def test_blocks_of_a_sketch_inherit_its_certificate():
    rows = spectrum_rows(60, 20, 0.9, 1)
    joint = make_structure("lowrank", (20, 1), rank=5)
    joint.update(rows_batch(rows))
    block = joint.block(4, (2, 5))
    assert block.certificate == joint.certificate > 0
    certificate_holds(block, rows[:, 4:14])


def test_sketch_of_tokens_is_the_sketch_of_their_rows():
    data = samples(30)
    by_tokens, by_rows = (make_structure("lowrank", SHAPE, rank=4) for _ in range(2))
    by_tokens.update(batch(data))
    by_rows.append(torch.stack([s.gradient() for s in data]), Counts(30, 30, 30))
    torch.testing.assert_close(by_tokens.dense(), by_rows.dense(), rtol=1e-4, atol=1e-4)
    assert by_tokens.certificate == pytest.approx(by_rows.certificate, rel=1e-4)


def test_a_batch_larger_than_the_buffer():
    rows = spectrum_rows(500, 30, 0.9, 0)
    sketch = make_structure("lowrank", (30, 1), rank=3)
    sketch.update(rows_batch(rows))
    certificate_holds(sketch, rows)
    assert sketch.counts.sequences == 500


@pytest.mark.parametrize(
    ("kind", "options"), [("full", {}), ("diagonal", {}), ("diagonal", {"centred": True}), ("lowrank", {})]
)
def test_appended_rows_are_those_of_the_batch(kind, options):
    """Joint structures take rows of any float dtype, with their counts; none change nothing."""
    data = samples(7)
    by_tokens, by_rows = (make_structure(kind, SHAPE, **options) for _ in range(2))
    by_tokens.update(batch(data))
    rows = torch.stack([s.gradient() for s in data])
    by_rows.append(rows[:4], Counts(4, 9, 5)), by_rows.append(rows[:0], Counts()), by_rows.append(rows[4:].float())
    assert by_rows.counts == Counts(4, 9, 5)
    by_rows.counts = by_tokens.counts
    torch.testing.assert_close(by_rows.dense(), by_tokens.dense(), rtol=1e-5, atol=1e-6)
