"""Hostile and unlucky input to every public function: an error that says what to do, a status, or the right answer.

Loops that would give wrong Fishers are in test_accumulate_refusals.py, damaged files in test_checkpoint.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sst_kernels as sst
from sst_kernels.fisher import STRUCTURES, Counts, TokenBatch, make_structure
from sst_kernels.gevp import GEVPStatus
from sst_kernels.gevp.operators import Dense, Diagonal, EigenKronecker, Kronecker, KroneckerSum, LowRank
from tests.models import tiny_batch, tiny_lora

EYE = torch.eye(4, dtype=torch.float64)
NAN, INF = math.nan, math.inf


def spoiled(matrix: torch.Tensor, value: float) -> torch.Tensor:
    matrix = matrix.clone()
    matrix[0, 1] = matrix[1, 0] = value
    return matrix


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(4, 3), torch.ones(4, 3), 1), {}, ValueError, "must be square"),
        ((torch.ones(4), torch.ones(4), 1), {}, ValueError, "must be square"),
        ((torch.tensor(1.0), torch.tensor(1.0), 1), {}, ValueError, "must be square"),
        ((EYE, torch.eye(3, dtype=torch.float64), 1), {}, ValueError, "must agree"),
        ((EYE.expand(2, 4, 4), EYE, 1), {}, ValueError, r"use expand\(\)"),
        ((EYE.long(), EYE.long(), 1), {}, TypeError, r"convert it with .double\(\)"),
        ((EYE.bool(), EYE, 1), {}, TypeError, "floating point"),
        ((EYE.to(torch.complex128), EYE, 1), {}, TypeError, "floating point"),
        (([[1.0]], [[1.0]], 1), {}, TypeError, "got float; use torch.as_tensor"),
        ((np.eye(4), EYE, 1), {}, TypeError, "got ndarray"),
        ((None, None, 1), {}, TypeError, "got NoneType"),
        ((EYE.to("meta"), EYE.to("meta"), 1), {}, TypeError, "meta tensor"),
        ((EYE.to_sparse(), EYE, 1), {}, TypeError, "layout"),
        ((EYE, EYE, -1), {}, ValueError, "k must be"),
        ((EYE, EYE, 5), {}, ValueError, "k must be between 0 and n = 4"),
        ((EYE, EYE, 1.5), {}, TypeError, "k must be an integer"),
        ((EYE, EYE, True), {}, TypeError, "k must be an integer"),
        ((EYE, EYE, "2"), {}, TypeError, "k must be an integer"),
        ((EYE, EYE, 1), {"damping": -1.0}, ValueError, "damping must be finite"),
        ((EYE, EYE, 1), {"damping": NAN}, ValueError, "damping must be finite"),
        ((EYE, EYE, 1), {"damping": INF}, ValueError, "damping must be finite"),
        ((EYE, EYE, 1), {"tol": NAN}, ValueError, "tol must lie"),
        ((EYE, EYE, 1), {"tol": 0.0}, ValueError, "tol must lie"),
        ((EYE, EYE, 1), {"max_cycles": 0}, ValueError, "max_cycles must be"),
        ((EYE, EYE, 1), {"seed": -1}, ValueError, "seed must be"),
        ((EYE, EYE, 1), {"seed": 2**70}, ValueError, "seed must be"),
        ((EYE, EYE, 1), {"method": "magic"}, ValueError, "method must be one of"),
        ((EYE, EYE, 1), {"preconditioner": "exact"}, ValueError, "preconditioner must be one of"),
    ],
)
def test_gevp_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        sst.gevp(*arguments, **options)


@pytest.mark.parametrize("method", ["direct", "jacobi_davidson"])
@pytest.mark.parametrize(
    ("a", "b", "status"),
    [
        (spoiled(EYE, NAN), EYE, GEVPStatus.non_finite),
        (EYE, spoiled(EYE, NAN), GEVPStatus.non_finite),
        (spoiled(EYE, INF), EYE, GEVPStatus.non_finite),
        (EYE, spoiled(EYE, -INF), GEVPStatus.non_finite),
        (EYE, -EYE, GEVPStatus.not_positive_definite),
        (EYE, 0 * EYE, GEVPStatus.not_positive_definite),
        (EYE + torch.ones(4, 4).triu(1), EYE, GEVPStatus.not_symmetric),
        (1e300 * EYE, 1e-300 * EYE, GEVPStatus.non_finite),
    ],
)
def test_problems_without_an_answer_have_a_status_and_leave_their_neighbours_alone(method, a, b, status):
    n = 64  # large enough for the iterative route
    lift = torch.eye(n, dtype=torch.float64)

    def embedded(small: torch.Tensor, scale: float) -> torch.Tensor:
        big = lift * scale
        big[:4, :4] = small
        return big

    scale = float(torch.nan_to_num(a.abs(), 0, 0).max()), float(b.diagonal().nan_to_num(0).abs().max()) or 1.0
    batch_a = torch.stack([lift.cumsum(0).mT @ lift.cumsum(0), embedded(a, scale[0]), lift])
    batch_b = torch.stack([lift, embedded(b, scale[1]), 2 * lift])
    result = sst.gevp(batch_a, batch_b, 2, method=method)
    assert result.statuses()[1] is status
    assert not result.ok
    for neighbour in (0, 2):
        alone = sst.gevp(batch_a[neighbour], batch_b[neighbour], 2, method=method)
        assert torch.equal(result.values[neighbour], alone.values)
        assert torch.equal(result.vectors[neighbour], alone.vectors)
    with pytest.raises(RuntimeError, match=status.name):
        result.raise_if_failed()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: LowRank(torch.ones(4)), ValueError),
        (lambda: LowRank(torch.ones(2, 4), torch.ones(3)), ValueError),
        (lambda: Diagonal(torch.ones(4, 4)), ValueError),
        (lambda: Dense(torch.ones(4, 3)), ValueError),
        (lambda: Kronecker(torch.ones(2, 3), torch.eye(2)), ValueError),
        (lambda: KroneckerSum([]), ValueError),
        (lambda: EigenKronecker(torch.eye(2), torch.eye(3), torch.ones(3, 2)), ValueError),
    ],
)
def test_operators_refuse(make, error):
    with pytest.raises(error):
        make()


@pytest.mark.parametrize(
    ("gain", "cost", "status"),
    [
        (LowRank(torch.full((2, 4), NAN)), LowRank(torch.ones(2, 4), 1.0), GEVPStatus.non_finite),
        (LowRank(torch.ones(2, 4)), LowRank(torch.ones(2, 4), NAN), GEVPStatus.non_finite),
        (LowRank(torch.ones(2, 4)), LowRank(torch.ones(2, 4), -1.0), GEVPStatus.not_positive_definite),
        (LowRank(torch.zeros(0, 4)), LowRank(torch.ones(2, 4), 1.0), GEVPStatus.rank_deficient),
        (Diagonal(torch.ones(4)), Diagonal(torch.zeros(4)), GEVPStatus.not_positive_definite),
        (Diagonal(torch.tensor([1.0, NAN, 1, 1])), Diagonal(torch.ones(4)), GEVPStatus.non_finite),
    ],
)
def test_structured_problems_have_a_status(gain, cost, status):
    assert sst.gevp(gain, cost, 1).statuses() == [status]


@pytest.mark.parametrize("kind", list(STRUCTURES))
def test_structures_refuse_unknown_options_and_empty_reading(kind):
    with pytest.raises(TypeError):
        make_structure(kind, (3, 4), nonsense=1)
    for option in ({"sample": "word"}, {"count": "pages"}):
        with pytest.raises(ValueError, match="expected"):
            make_structure(kind, (3, 4), **option)
    with pytest.raises((ValueError, RuntimeError), match=r"holds no (sequences|samples)|has no eigenbases"):
        make_structure(kind, (3, 4)).dense()


@pytest.mark.parametrize("kind", sorted(STRUCTURES.keys() - {"eigen_kronecker"}))
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5, 1]])
def test_single_tokens_and_duplicate_rows_are_samples_like_others(kind, lengths):
    """One token a sequence, and every sequence twice: F is the mean, so doubling the data changes nothing."""
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(total, 3, generator=generator), torch.randn(total, 4, generator=generator)
    ends = torch.tensor(lengths).cumsum(0)
    spans = torch.stack([ends - torch.tensor(lengths), ends], 1)
    batch = TokenBatch(left, right, spans, torch.ones(len(lengths)), Counts(len(lengths), total, total))
    once, twice = make_structure(kind, (3, 4)), make_structure(kind, (3, 4))
    once.update(batch)
    for _ in range(2):
        twice.update(batch)
    assert torch.isfinite(once.dense()).all()
    torch.testing.assert_close(once.dense(), twice.dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"space": "logits"}, ValueError),
        ({"structure": "hessian"}, ValueError),
        ({"scope": "galaxy"}, ValueError),
        ({"point": "nowhere"}, ValueError),
        ({"point": NAN}, ValueError),
        ({"point": INF}, ValueError),
        ({"point": {}}, ValueError),
        ({"sample": "word"}, ValueError),
        ({"count": "pages"}, ValueError),
        ({"reduction": "median"}, ValueError),
        ({"grad_scale": 0.0}, ValueError),
        ({"grad_scale": NAN}, ValueError),
        ({"nonfinite": "ignore"}, ValueError),
        ({"modules": "no_such_module"}, ValueError),
        ({"modules": "("}, ValueError),
        ({"modules": []}, ValueError),
        ({"structure": "lowrank", "rank": 0}, ValueError),
        ({"rank": 3}, TypeError),
        ({"sequences": -1}, ValueError),
        ({"sequences": 1.5}, ValueError),
        ({"state_device": "nowhere"}, ValueError),
        ({"state_device": "cuda:99"}, ValueError),
    ],
)
def test_fisher_accumulate_refuses(options, error):
    with pytest.raises(error):
        sst.fisher_accumulate(tiny_lora(), "safety", **options)


@pytest.mark.parametrize("model", [None, "Llama-2-7b", {}])
@pytest.mark.parametrize("opens", [sst.fisher_accumulate, sst.input_moments])
def test_what_is_no_model_is_refused(opens, model):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        opens(model, "safety")


def test_weights_that_are_not_finite_are_named():
    model = tiny_lora()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["safety"].weight.data[0, 0] = NAN
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: lora_A .*not finite"):
        sst.fisher_accumulate(model, "safety")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "no 'labels'"),
        ({"labels": torch.full((3, 12), -100)}, "masked|no labels"),
        ({"labels": torch.zeros(3, 11, dtype=torch.int64)}, "shape of the input tokens"),
        ({"labels": torch.zeros(2, 12, dtype=torch.int64)}, "shape of the input tokens"),
        ({"attention_mask": torch.ones(3, 11)}, "attention_mask must have the shape"),
        ({"attention_mask": torch.zeros(3, 12, dtype=torch.int64)}, "padding|no labels"),
        ({"input_ids": torch.zeros(0, 12, dtype=torch.int64)}, "holds no sequences"),
    ],
)
def test_batches_refused(change, message):
    model, batch = tiny_lora(), tiny_batch(3) | change
    with pytest.raises(ValueError, match=message), sst.fisher_accumulate(model, "safety"):
        sst.sequence_nll(model, batch).backward()


def test_an_empty_batch_is_refused():
    model = tiny_lora()
    empty = {k: v[:0] for k, v in tiny_batch(2).items()}
    with pytest.raises(ValueError, match="holds no sequences"), sst.fisher_accumulate(model, "safety"):
        sst.sequence_nll(model, empty).backward()


@pytest.mark.parametrize("groups", [[0], [0, 1, 2, 3]])
def test_groups_of_the_wrong_length_are_refused(groups):
    model = tiny_lora()
    with (
        pytest.raises(ValueError, match="one integer for each of the 3 samples"),
        sst.fisher_accumulate(model, "safety"),
    ):
        sst.sequence_nll(model, tiny_batch(3), groups=groups).backward()


def accumulated(count: int = 8, **options) -> sst.Fisher:
    model = tiny_lora()
    with sst.fisher_accumulate(model, "safety", **options) as pass_:
        sst.sequence_nll(model, tiny_batch(count)).backward()
    return pass_.fisher


@pytest.fixture(scope="module")
def fishers() -> tuple[sst.Fisher, sst.Fisher]:
    return accumulated(), accumulated(9)


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "galaxy"},
        {"damping": 0.0},
        {"damping": NAN},
        {"damping": INF},
        {"damping": 1e-320},
        {"folds": 1},
        {"folds": 9},
    ],
)
def test_subspace_refuses_settings(options, fishers):
    with pytest.raises(ValueError, match=r"scope|damping|folds"):
        sst.subspace(*fishers, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "factor", "structure": "diagonal"}, "space differs"),
        ({"point": "reference"}, "different points"),
        ({"modules": ".*q_proj"}, "differs"),
    ],
)
def test_subspace_refuses_fishers_that_do_not_match(options, message, fishers):
    with pytest.raises(ValueError, match=message):
        sst.subspace(fishers[0], accumulated(**options))


@pytest.mark.parametrize("other", [None, 3, {}])
def test_subspace_refuses_what_is_no_fisher(other, fishers):
    with pytest.raises(TypeError, match="cost must be a Fisher"):
        sst.subspace(fishers[0], other)
    with pytest.raises(TypeError, match="gain must be a Fisher"):
        sst.subspace(other, fishers[0])


def test_subspace_names_rows_that_are_not_finite(fishers):
    import copy

    broken = copy.deepcopy(fishers[0])
    broken.rows()[2, 5] = NAN
    for pair in ((broken, fishers[1]), (fishers[1], broken)):
        for scope in ("global", "module"):
            with pytest.raises((ValueError, RuntimeError), match=r"not finite|non_finite"):
                sst.subspace(*pair, scope=scope)


@pytest.mark.parametrize("name", ["soft", "threshold", "top_k"])
@pytest.mark.parametrize(
    "options",
    [{}, {"kl_budget": -1.0}, {"kl_budget": NAN}, {"value": -1}, {"value": NAN}, {"value": 1, "kl_budget": 1}],
)
def test_filters_refuse(name, options, fishers):
    solved = sst.subspace(*fishers)
    own = "k" if name == "top_k" else "mu"
    with pytest.raises(ValueError, match=r"must|give exactly"):
        getattr(solved, name)(**{own if option == "value" else option: v for option, v in options.items()})
