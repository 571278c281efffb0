"""What every Fisher structure promises, whatever it keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels.fisher.base import Counts
from sst_kernels.fisher.structures import STRUCTURES, make_structure
from tests.structure_cases import CASES, LOSSY_MERGE, SHAPE, batch, build, empty_batch, samples

every = pytest.mark.parametrize("case", CASES)


def close(actual: torch.Tensor, expected: torch.Tensor, ulps: float = 64) -> None:
    """Equal up to `ulps` float32 roundings of the largest entry: sums of a few dozen products each."""
    assert actual.dtype == torch.float64
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= ulps * 2**-24, f"{float(error):.1e}"


def filled(case: str, data, sizes=(3, 1, 4), **options):
    structure, at = build(case, **options), 0
    while at < len(data):
        for size in sizes:
            if part := data[at : at + size]:
                structure.update(batch(part))
            at += size
    return structure


@every
@pytest.mark.parametrize("layout", ["right", "left"])
def test_padding_never_reaches_the_result(case, layout):
    data = samples(9)
    packed, padded = build(case), build(case)
    packed.update(batch(data, "packed"))
    padded.update(batch(data, layout, poison=float("nan")))
    close(padded.dense(), packed.dense())


@every
def test_batch_composition_does_not_matter(case):
    data = samples(12)
    together, apart = build(case), build(case)
    together.update(batch(data))
    for one in data:
        apart.update(batch([one], "right"))
    close(apart.dense(), together.dense(), ulps=512)
    assert apart.counts == together.counts


@every
def test_merging_equals_one_pass(case):
    data = samples(14)
    whole, first, second = filled(case, data), filled(case, data[:5]), filled(case, data[5:])
    first.merge(second)
    assert first.counts == whole.counts
    if case in LOSSY_MERGE:
        sketch = getattr(first, "_rows", first)
        rows = torch.stack([s.gradient() for s in data])
        gaps = torch.linalg.eigvalsh(rows.mT @ rows - sketch.rows.mT.double() @ sketch.rows.double())
        certificate, rounding = first.certificate * 14, float(sketch._rounding)
        assert -rounding <= gaps.min()
        assert gaps.max() <= certificate
        assert certificate < torch.linalg.matrix_norm(rows, 2) ** 2
    else:
        close(first.dense(), whole.dense(), ulps=512)


@every
def test_merging_into_an_empty_one(case):
    source, target = filled(case, samples(6)), build(case)
    target.merge(source)
    close(target.dense(), source.dense())


@every
def test_state_round_trip(case):
    structure = filled(case, samples(11))
    state = {name: tensor.clone() for name, tensor in structure.state_dict().items()}
    kind = CASES[case][0]
    loaded = make_structure(kind, SHAPE, **structure.options())
    loaded.load_state_dict(state)
    loaded.counts = structure.counts
    assert torch.equal(loaded.dense(), structure.dense())
    assert loaded.options() == structure.options()
    more = batch(samples(3, seed=5))
    loaded.update(more), structure.update(more)
    assert torch.equal(loaded.dense(), structure.dense())
    assert set(loaded.state_dict()) == set(state)


@every
def test_loading_copies_the_state(case):
    structure, loaded = filled(case, samples(4)), build(case)
    loaded.load_state_dict(structure.state_dict())
    loaded.counts = Counts(4, 4, 4)
    before = structure.dense()
    loaded.update(batch(samples(4, seed=8)))
    assert torch.equal(structure.dense(), before)


@every
def test_matvec_and_quadratic_agree_with_dense(case):
    structure = filled(case, samples(10))
    vectors = torch.randn(structure.size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = structure.dense()
    torch.testing.assert_close(structure.matvec(vectors), dense @ vectors, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(structure.matvec(vectors[:, 0]), dense @ vectors[:, 0], rtol=1e-10, atol=1e-10)
    expected = (vectors * (dense @ vectors)).sum(0)
    torch.testing.assert_close(structure.quadratic(vectors), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(structure.quadratic(vectors[:, 0]), expected[0], rtol=1e-10, atol=1e-10)


@every
@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    count=st.integers(1, 12),
    seed=st.integers(0, 2**16),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_positive_semidefinite(case, shape, count, seed, size, dtype):
    options = dict(CASES[case][1])
    if "svd" in case:
        options["rank"] = min(options.get("rank", 1), min(shape) ** 2)
    data = samples(count, shape, seed=seed, dtype=dtype)
    for s in data:
        s.left.mul_(size)
    structure = build(case, shape, **options)
    structure.update(batch(data))
    dense = structure.dense()
    assert torch.isfinite(dense).all()
    assert torch.equal(dense, dense.mT) or (dense - dense.mT).abs().max() <= 1e-14 * dense.abs().max()
    values = torch.linalg.eigvalsh((dense + dense.mT) / 2)
    assert values.min() >= -1e-13 * values.max().clamp_min(1e-300)
    assert (structure.quadratic(torch.eye(structure.size)) >= 0).all()


@pytest.mark.parametrize(
    "case", [case for case in CASES if case != "vila"]
)  # a variance is over the samples, whatever the count
def test_the_normaliser_is_the_readers_choice(case):
    data = samples(7)
    dense = {}
    for count in ("sequences", "tokens", "labels"):
        structure = build(case, count=count)
        structure.update(batch(data))
        dense[count] = structure.dense() * getattr(structure.counts, count)
        assert structure.normaliser == getattr(structure.counts, count)
    close(dense["tokens"], dense["sequences"])
    close(dense["labels"], dense["sequences"])


@every
def test_token_samples(case):
    """sample="token" is the Fisher of the same tokens, each a sequence of its own."""
    data = samples(5)
    tokens = [type(s)(s.left[t : t + 1], s.right[t : t + 1], s.scale) for s in data for t in range(len(s.left))]
    by_option, by_hand = build(case, sample="token", count="tokens"), build(case, count="tokens")
    by_option.update(batch(data))
    by_hand.update(batch(tokens))
    close(by_option.dense(), by_hand.dense())


@every
def test_empty_batches_change_nothing_and_empty_structures_refuse_to_answer(case):
    structure = build(case)
    structure.update(empty_batch())
    with pytest.raises(ValueError, match="run backward passes"):
        structure.dense()
    structure.update(batch(samples(3)))
    before = structure.dense()
    structure.update(empty_batch())
    assert torch.equal(structure.dense(), before)


@every
def test_nbytes_counts_the_state(case):
    structure = filled(case, samples(4))
    assert structure.nbytes == sum(t.numel() * t.element_size() for t in structure.state_dict().values()) > 0


@every
def test_different_options_do_not_merge(case):
    one, other = build(case), build(case, sample="token")
    with pytest.raises(ValueError, match="cannot merge"):
        one.merge(other)
    with pytest.raises(ValueError, match="cannot merge"):
        one.merge(build("diagonal" if case == "full" else "full"))


def test_registry():
    assert set(STRUCTURES) == {kind for kind, _ in CASES.values()}
    with pytest.raises(ValueError, match="expected one of"):
        make_structure("hessian", SHAPE)
    with pytest.raises(TypeError):
        make_structure("full", SHAPE, rank=3)


@pytest.mark.parametrize("option", [{"rank": 1.5}, {"rank": True}, {"rank": "4"}, {"rank": 0}, {"rank": None}])
@pytest.mark.parametrize("kind", ["lowrank", "kronecker_lowrank", "kronecker_svd"])
def test_ranks_are_whole_numbers(kind, option):
    with pytest.raises(ValueError, match="rank: expected a whole number of at least 1, got"):
        make_structure(kind, (4, 6), **option)
