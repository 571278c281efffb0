"""Label weights: a weighted loss is the sum of its parts, in the loss and in the rows of a Fisher."""

from contextlib import nullcontext

import pytest
import torch

from sst_kernels import fisher_accumulate, opening_weights, sequence_nll
from tests.models import tiny_batch, tiny_lora


def test_opening_weights_count_labels_not_columns():
    labels = torch.tensor([[-100, -100, 5, 6, 7, 8], [-100, 5, -100, 6, 7, -100], [-100, -100, -100, -100, -100, 9]])
    expected = torch.tensor([[3.0, 3, 3, 3, 1, 1], [3, 3, 3, 3, 1, 1], [3, 3, 3, 3, 3, 3]])
    answers = labels != -100
    torch.testing.assert_close(opening_weights(labels, tokens=2, weight=3.0)[answers], expected[answers])
    assert (opening_weights(labels, tokens=0, weight=3.0)[answers] == 1).all()
    everywhere = torch.tensor([[5, 6, 7, 8, 9]])  # no position predicts the first column
    assert opening_weights(everywhere, tokens=2, weight=3.0)[0, 1:].tolist() == [3, 3, 1, 1]
    for wrong in ({"tokens": -1}, {"weight": float("nan")}, {"weight": float("inf")}, {"weight": 1e39}):
        with pytest.raises(ValueError, match="of float32 and not negative"):
            opening_weights(labels, **wrong)


def rows(weights=None):
    model, batch = tiny_lora(), tiny_batch(3)
    with fisher_accumulate(model, "safety") as accumulator:
        loss = sequence_nll(model, batch, weights=weights)
        loss.backward()
    assert accumulator.fisher.meta["labels"] == ("data" if weights is None else "weighted data")
    return loss.detach(), accumulator.fisher.rows()


def test_rows_are_linear_in_the_weights():
    labels = tiny_batch(3)["labels"]
    opening = opening_weights(labels, tokens=2, weight=1.0)
    first = torch.where((labels != -100).cumsum(1) <= 2, 1.0, 0.0)
    (whole, plain), (uniform, same), (part, openings) = rows(), rows(opening), rows(first)
    weighted, found = rows(opening_weights(labels, tokens=2, weight=3.0))
    torch.testing.assert_close(uniform, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))
    torch.testing.assert_close(weighted, whole + 2 * part, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, plain + 2 * openings, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))
    assert openings.abs().max() > 1e-3 * plain.abs().max()


def test_weights_of_another_shape_are_refused():
    model, batch = tiny_lora(), tiny_batch(3)
    with pytest.raises(ValueError, match="shape of the labels"):
        sequence_nll(model, batch, weights=torch.ones(3, 2))
    with pytest.raises(ValueError, match='go with labels="empirical"'):
        sequence_nll(model, batch, "mc", weights=torch.ones_like(batch["labels"]))


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_labels_are_not_drawn_from_logits_that_are_not_finite(spoiled):
    model, batch = tiny_lora(), tiny_batch(2)
    model.get_base_model().lm_head.weight.data[3] = spoiled
    with pytest.raises(FloatingPointError, match="logits are not finite, so that no labels can be drawn"):
        sequence_nll(model, batch, "mc")


@pytest.mark.parametrize(("old", "new"), [("data", "empirical"), ("model", "mc")])
def test_old_names_of_label_sources_hold_and_name_the_new_ones(old, new):
    model, batch = tiny_lora(), tiny_batch(2)
    values = []
    for name, expected in (
        (old, pytest.warns(DeprecationWarning, match=f'called labels="{new}"')),
        (new, nullcontext()),
    ):
        with expected:
            values.append(sequence_nll(model, batch, name, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*values)
