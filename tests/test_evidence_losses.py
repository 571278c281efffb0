"""What a reading takes of a batch: any loop, named losses, label draws, samples that are left out."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import sst_kernels as sst
from sst_kernels.evidence import reading as reading_module
from sst_kernels.fisher.structures.moment import dense
from sst_kernels.testing import error_ratio
from tests import test_transfer
from tests.models import ROUNDING, one_by_one, tiny_batch, tiny_lora

MODEL = "base_model.model.model"
streams = test_transfer.streams  # a fixture: streams that work late


def of(model=None, **options):
    return sst.Evidence.of(tiny_lora().double() if model is None else model, "safety", **options)


def rows_of(evidence, side="gain", name="loss"):
    return getattr(evidence, side).rows[name].rows()


def expected(*batches, **settings):
    evidence = of()
    with evidence.accumulate("gain") as reading:
        for batch in batches:
            reading.backward(batch, **settings)
    return evidence


def rows_by_definition(model, batch):
    """Per sample Σ_t e_t x_tᵀ of all modules, from the weight gradient of a layer without the patch: cBᵀ ∂L/∂W."""
    evidence = of(model)
    weights = {s: evidence.weights.b[s].double() for s in evidence.weights.b}
    out = []
    with model.disable_adapter():
        for sample in one_by_one(batch):
            layers = {name: model.get_submodule(f"base_model.model.{name}").base_layer for name in weights}
            for layer in layers.values():
                layer.weight.requires_grad_(True)
            logits = model(**{k: v for k, v in sample.items() if k != "labels"}).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), sample["labels"][:, 1:].flatten(), reduction="sum")
            grads = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
            parts = [evidence.weights.scaling[n] * weights[n].mT @ g for n, g in zip(layers, grads)]
            out.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(out)


def test_rows_are_the_gradients_of_single_samples():
    batch = tiny_batch(5)
    evidence = expected(batch)
    assert error_ratio(rows_of(evidence), rows_by_definition(tiny_lora().double(), batch)) < ROUNDING
    assert evidence.gain.counts.labels == (batch["labels"][:, 1:] != -100).sum()
    assert evidence.gain.counts.tokens == evidence.gain.moments.tokens == batch["attention_mask"].sum()


def own_loss(model, batch, reduction):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with sst.declared_loss(batch["labels"], reduction=reduction) as declared:
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction=reduction)
        return declared.loss(loss)


LOOPS = {
    "model(**batch).loss": lambda model, batch: model(**batch).loss,
    "accumulation": lambda model, batch: model(**batch).loss / 4,
    "sequence_nll": lambda model, batch: sst.sequence_nll(model, batch),
    "declared sum": lambda model, batch: own_loss(model, batch, "sum"),
    "declared mean": lambda model, batch: own_loss(model, batch, "mean") * 3.0,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_of_ones_own(loop):
    data = [tiny_batch(3, seed=i) for i in range(2)]
    model = tiny_lora().double()
    evidence = of(model)
    with evidence.accumulate("gain"):
        for batch in data:
            LOOPS[loop](model, batch).backward()
    other = expected(*data)
    assert error_ratio(rows_of(evidence), rows_of(other)) < ROUNDING
    assert evidence.gain.counts == other.gain.counts
    assert evidence.gain.rows["loss"].groups == other.gain.rows["loss"].groups == list(range(6))
    for name, moment in other.gain.moments.items():
        assert error_ratio(dense(evidence.gain.moments[name]), dense(moment)) < ROUNDING


def test_several_forward_passes_before_one_backward():
    data = [tiny_batch(2, seed=i) for i in range(2)]
    model = tiny_lora().double()
    evidence = of(model)
    with evidence.accumulate("gain"):
        losses = [sst.sequence_nll(model, batch, groups=[2 * i, 2 * i + 1]) for i, batch in enumerate(data)]
        (sum(losses) / 2).backward()
    groups = evidence.gain.rows["loss"].groups
    assert sorted(groups) == [0, 1, 2, 3]
    assert error_ratio(rows_of(evidence), rows_of(expected(*data))[groups]) < ROUNDING


def test_named_losses_add_up_to_the_weighted_one():
    """Also with factors, as `losses=` gives them, and in the core of a filtered patch."""
    data = [tiny_batch(4, seed=i) for i in range(2)]
    evidence, benign = of(), [tiny_batch(4, seed=9)]
    parts = []
    with evidence.accumulate("gain") as reading:
        for batch in data:
            opening = (sst.opening_weights(batch["labels"], tokens=2, weight=2.0) == 2.0).double()
            parts.append((opening, 1 - opening))
            reading.backward(batch, weights={"decide": opening, "rest": 1 - opening})
    with evidence.accumulate("cost") as reading:
        reading.backward(benign[0])
    assert list(evidence.gain.rows) == ["decide", "rest"]
    assert evidence.gain.counts.sequences == 8
    for factors in ({"decide": 1.0, "rest": 1.0}, {"decide": 3.0, "rest": 0.5}, {"rest": 1.0}):
        other = of()
        with other.accumulate("gain") as reading:
            for batch, (opening, rest) in zip(data, parts):
                weights = factors.get("decide", 0.0) * opening + factors["rest"] * rest
                reading.backward(batch, weights=weights)
        with other.accumulate("cost") as reading:
            reading.backward(benign[0])
        summed = sum(factor * rows_of(evidence, name=name) for name, factor in factors.items())
        assert error_ratio(summed, rows_of(other)) < ROUNDING
        core = evidence.filter(3.0, losses=factors).gain
        assert error_ratio(core.rows(), other.filter(3.0).gain.rows()) < 1e-5
        assert core.counts == other.gain.counts
        assert core.meta["labels"] == "weighted data"
    for name, moment in other.gain.moments.items():  # one forward pass, whatever the number of losses
        assert torch.equal(dense(evidence.gain.moments[name]), dense(moment))
    assert torch.equal(
        evidence.filter(3.0).gain.rows(), evidence.filter(3.0, losses={"decide": 1, "rest": 1}).gain.rows()
    )


def test_losses_that_are_not_there_or_do_not_fit():
    evidence, batch = of(), tiny_batch(2)
    ones = torch.ones(batch["labels"].shape)
    with evidence.accumulate("gain") as reading:
        reading.backward(batch, weights={"a": ones, "b": ones})
        for weights, message in (
            ({}, "got the names"),
            ({0: ones}, "got the names"),
            (ones[:, 1:], "must have the shape"),
        ):
            if message == "got the names":
                with pytest.raises(ValueError, match=message):
                    reading.backward(batch, weights=weights)
    with evidence.accumulate("cost") as reading:
        reading.backward(batch)
    with pytest.raises(ValueError, match=r"losses \['c'\] were not accumulated; there are \['a', 'b'\]"):
        evidence.filter(1.0, losses={"c": 1.0})
    with pytest.raises(ValueError, match="expected factors of some of"):
        evidence.filter(1.0, losses={})
    for other in ({"a": ones}, {"a": ones, "c": ones}, None):
        before = evidence.gain.counts.sequences
        with pytest.raises(ValueError, match="the losses differ"), evidence.accumulate("gain") as reading:
            reading.backward(batch, weights={"a": ones, "b": ones})
            reading.backward(batch, weights=other)
        assert evidence.gain.counts.sequences == before
    with pytest.raises(ValueError, match="the losses differ"), evidence.accumulate("gain") as reading:
        reading.backward(batch, weights={"a": ones})


@pytest.mark.parametrize("draws", [1, 3])
def test_each_draw_is_a_pass_with_these_labels(draws, monkeypatch):
    """One forward pass; the rows of draw k are those of a pass over the labels of draw k, groups keep prompts whole."""
    data, drawn, draw = [tiny_batch(n, seed=n) for n in (3, 2)], [], reading_module.draw_labels
    monkeypatch.setattr(reading_module, "draw_labels", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    evidence, calls = of(model := tiny_lora().double()), []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with evidence.accumulate("cost") as reading:
        for batch in data:
            reading.backward(batch, labels="mc", draws=draws, generator=torch.Generator().manual_seed(4))
    handle.remove()
    assert len(calls) == 2
    side = evidence.cost
    assert side.counts.sequences == 5 * draws
    assert side.counts.labels == draws * sum(int((b["labels"][:, 1:] != -100).sum()) for b in data)
    assert side.moments.tokens == sum(int(b["attention_mask"].sum()) for b in data)
    assert side.rows["loss"].groups == [0, 1, 2] * draws + [3, 4] * draws
    assert side.rows["loss"].meta["labels"] == "model"
    at, known = 0, set()
    for batch, answers in zip(data, drawn, strict=True):
        assert len(answers) == draws
        for labels in answers:
            known.add(tuple(labels.tolist()))
            where = batch["labels"] != -100
            where[:, 0] = False
            relabelled = batch["labels"].clone()
            relabelled[where] = labels
            n = len(where)
            other = rows_of(expected(batch | {"labels": relabelled}))
            assert error_ratio(rows_of(evidence, "cost")[at : at + n], other) < ROUNDING
            at += n
    assert len(known) == 2 * draws


def test_groups_that_are_given_are_kept():
    evidence, batch = of(), tiny_batch(3)
    with evidence.accumulate("cost") as reading:
        reading.backward(batch, labels="mc", draws=2, groups=[7, 7, 2])
        with pytest.raises(ValueError, match="groups must hold one integer for each of the 3 samples"):
            reading.backward(batch, labels="mc", draws=2, groups=[1, 2])
        reading.abandon()
    assert evidence.cost.rows["loss"].groups == [7, 7, 2, 7, 7, 2]


def poison(model, sample):
    """The output gradient of one sample is not finite at the last LoRA layer."""

    def hook(_module, _inputs, output):
        if output.requires_grad:
            output.register_hook(lambda g: g.index_fill(0, torch.tensor([sample]), float("nan")))

    return model.get_submodule(f"{MODEL}.norm").register_forward_hook(hook)


@pytest.mark.parametrize("how", ["one loss", "two losses", "two draws"])
def test_samples_that_are_not_finite_are_left_out_whole(how):
    """In all of their rows; the others' rows, groups and counts are those of a pass without them."""
    batch, kept = tiny_batch(4), [0, 1, 3]
    ones = torch.ones(batch["labels"].shape)
    settings = {
        "one loss": {"groups": [5, 6, 7, 8]},
        "two losses": {"weights": {"a": ones, "b": 2 * ones}},
        "two draws": {"labels": "mc", "draws": 2},
    }[how]
    found = []
    for bad in (True, False):
        model = tiny_lora().double()
        evidence = of(model, nonfinite="skip" if bad else "raise")
        with evidence.accumulate("gain") as reading:
            handle = poison(model, 2) if bad else None
            reading.backward(batch, **settings, generator=torch.Generator().manual_seed(1))
            if handle:
                handle.remove()
            reading.backward(tiny_batch(2, seed=5), **_fewer(settings), generator=torch.Generator().manual_seed(2))
        found.append(evidence.gain)
    skipped, whole = found
    assert skipped.skipped == [(0, 2)]
    assert whole.skipped == []
    for name, fisher in skipped.rows.items():
        copies = 2 if how == "two draws" else 1
        where = [4 * i + k for i in range(copies) for k in kept] + [4 * copies + i for i in range(2 * copies)]
        assert error_ratio(fisher.rows(), whole.rows[name].rows()[where]) < ROUNDING
        if how != "two losses":
            assert fisher.groups == [whole.rows[name].groups[i] for i in where]
        assert fisher.counts.sequences == len(where)
    lost = int((batch["labels"][2, 1:] != -100).sum()) * (2 if how == "two draws" else 1)
    assert skipped.counts.labels == whole.counts.labels - lost
    assert skipped.moments.tokens == whole.moments.tokens  # what was read is finite, and known of every sample


def _fewer(settings):
    out = dict(settings)
    if "groups" in out:
        out["groups"] = out["groups"][:2]
    if "weights" in out:
        out["weights"] = {name: w[:2] for name, w in out["weights"].items()}
    return out


def test_samples_that_are_not_finite_are_named_and_leave_the_evidence_alone():
    model = tiny_lora().double()
    evidence = of(model)
    with evidence.accumulate("gain") as reading:
        reading.backward(tiny_batch(3))
    before = rows_of(evidence).clone()
    with (
        pytest.raises(FloatingPointError, match=r"batch 1: the gradients of samples \[2\]"),
        evidence.accumulate("gain") as reading,
    ):
        reading.backward(tiny_batch(4))
        handle = poison(model, 2)
        reading.backward(tiny_batch(4))
    handle.remove()
    assert torch.equal(rows_of(evidence), before)
    assert evidence.gain.moments.tokens == int(tiny_batch(3)["attention_mask"].sum())


def test_inputs_that_are_not_finite_are_named():
    model = tiny_lora()
    model.get_submodule(f"{MODEL}.layers.1.input_layernorm").weight.data[3] = float("inf")
    evidence = of(model, nonfinite="skip")
    with (
        pytest.raises(FloatingPointError, match=r"layers\.1\.self_attn\.q_proj read"),
        evidence.accumulate("gain") as r,
    ):
        r.backward(tiny_batch(2))
    assert evidence.gain.counts.sequences == 0


def test_forward_passes_without_gradients_do_not_count():
    """Evaluation in mid-pass, between batches and between a forward pass and its backward."""
    model, batch = tiny_lora().double(), tiny_batch(3)
    evidence = of(model)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with evidence.accumulate("gain") as reading:
        with torch.no_grad():
            inside = model(**inputs).logits
        loss = sst.sequence_nll(model, batch)
        with torch.no_grad():
            model(**tiny_batch(5, seed=8))
        loss.backward()
        with torch.inference_mode():
            model(**inputs)
        reading.backward(tiny_batch(2, seed=3))
    other = expected(batch, tiny_batch(2, seed=3))
    assert error_ratio(rows_of(evidence), rows_of(other)) < ROUNDING
    assert evidence.gain.moments.tokens == other.gain.moments.tokens
    for name, moment in other.gain.moments.items():
        assert error_ratio(dense(evidence.gain.moments[name]), dense(moment)) < ROUNDING
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(inside, model(**inputs).logits)


def test_a_forward_pass_with_gradients_and_no_backward_is_refused():
    """Its inputs are in the moments, and nothing in the rows."""
    model = tiny_lora()
    evidence = of(model)
    with (
        pytest.raises(RuntimeError, match="1 forward passes were never followed by backward"),
        evidence.accumulate("gain") as reading,
    ):
        reading.backward(tiny_batch(2))
        model(**tiny_batch(2))
    assert evidence.gain.counts.sequences == evidence.gain.moments.tokens == 0


def test_what_is_refused():
    model, batch = tiny_lora(), tiny_batch(2)
    evidence = of(model)
    ones = torch.ones(batch["labels"].shape)
    refused = [
        ({"labels": "drawn"}, 'labels: expected "empirical" or "mc"'),
        ({"labels": "mc", "weights": ones}, 'weights go with labels="empirical"'),
        ({"draws": 2}, 'draws=2 goes with labels="mc"'),
        ({"labels": "mc", "draws": 0}, "draws: expected a whole number of at least 1, got 0"),
        ({"labels": "mc", "draws": 1.5}, "draws: expected a whole number"),
    ]
    with evidence.accumulate("gain") as reading:
        for settings, message in refused:
            with pytest.raises(ValueError, match=message):
                reading.backward(batch, **settings)
        with pytest.raises(ValueError, match="batch has no 'labels'"):
            reading.backward({"input_ids": batch["input_ids"]})
        reading.backward(batch)
    with pytest.raises(RuntimeError, match="this pass is over"):
        reading.__enter__()
    with pytest.raises(ValueError, match='side: expected "gain", "cost" or "guard"'):
        evidence.accumulate("harm")
    with pytest.raises(ValueError, match="the cost side holds no sequences"):
        evidence.filter(1.0)
    with pytest.raises(RuntimeError, match="no hook fired"), evidence.accumulate("gain"):
        pass
    for options, message in (({"dtype": "float16"}, "dtype: expected"), ({"nonfinite": "drop"}, "nonfinite: expected")):
        with pytest.raises(ValueError, match=message):
            of(model, **options)
    model.get_submodule(f"{MODEL}.layers.0.self_attn.q_proj").lora_A["safety"].weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="the weights of 'safety' have changed since"):
        evidence.accumulate("gain")


def test_passes_over_one_side_add_up():
    evidence = of()
    for seed in range(2):
        with evidence.accumulate("gain") as reading:
            reading.backward(tiny_batch(3, seed=seed))
    other = expected(tiny_batch(3, seed=0), tiny_batch(3, seed=1))
    assert torch.equal(rows_of(evidence), rows_of(other))
    assert evidence.gain.rows["loss"].groups == list(range(6))
    for name, moment in other.gain.moments.items():
        assert error_ratio(dense(evidence.gain.moments[name]), dense(moment)) < ROUNDING


@pytest.mark.parametrize("first", ["evidence", "reference", "patched", "moments"])
@pytest.mark.parametrize("second", ["evidence", "reference", "patched", "moments"])
def test_two_passes_at_once(first, second):
    """Refused where one of them would find the adapter switched off, whichever was made first; the model is as it was."""
    model, batch = tiny_lora(adapters=("task", "safety")), tiny_batch(2)
    evidence = of(model)
    make = {
        "evidence": lambda: evidence.accumulate("gain"),
        "reference": lambda: sst.fisher_accumulate(model, "safety", point="reference"),
        "patched": lambda: sst.fisher_accumulate(model, "safety"),
        "moments": lambda: sst.input_moments(model, "safety"),
    }
    before = model(**batch).logits
    one, other = make[first](), make[second]()
    if first == second == "patched":
        with one, other:
            model(**batch).loss.backward()
        assert torch.equal(one.fisher.rows(), other.fisher.rows())
    else:
        with one, pytest.raises(RuntimeError, match="another pass is open on model"):
            try:
                other.__enter__()
            finally:
                model(**batch).loss.backward()
        with other:
            model(**batch).loss.backward()
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("compiled", ["model", "layers", "first inside"])
@pytest.mark.parametrize("loop", ["own", "backward"])
def test_compiled_models_are_read_exactly(compiled, loop):
    """What torch.compile has made of modules runs as they are written while a pass is open, and compiled again afterwards."""
    model, batch, graphs = tiny_lora(), tiny_batch(3), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    outer = model
    if compiled == "layers":
        for layer in model.get_submodule(f"{MODEL}.layers"):
            layer.compile(backend=backend)
    else:
        outer = torch.compile(model, backend=backend)
    if compiled != "first inside":
        outer(**batch).loss.backward()
        assert graphs
    evidence, before = of(outer), len(graphs)
    with evidence.accumulate("gain") as reading:
        outer(**batch).loss.backward() if loop == "own" else reading.backward(batch)
    with torch.no_grad(), sst.input_moments(outer, "safety") as moments:
        outer(**batch)
    assert len(graphs) == before
    plain = of(tiny_lora())
    with plain.accumulate("gain") as reading:
        plain_model = reading.model
        plain_model(**batch).loss.backward() if loop == "own" else reading.backward(batch)
    assert torch.equal(rows_of(evidence), rows_of(plain))
    for name, moment in moments.items():
        assert torch.equal(dense(moment), dense(plain.gain.moments[name]))
    torch.compiler.reset()
    outer(**batch)
    assert len(graphs) > before


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_rows_on_their_way_to_the_host(nonfinite, streams, monkeypatch):
    """With the state on the host of a GPU, whose copies arrive late: rows, groups and what is skipped are those kept beside the model."""
    monkeypatch.setattr(reading_module, "crosses", lambda source, target: streams.used)
    found = []
    for mode in (nullcontext(), streams):
        model = tiny_lora()
        evidence = of(model, nonfinite=nonfinite)
        with mode, evidence.accumulate("cost") as reading:
            for i in range(5):
                handle = poison(model, 1) if nonfinite == "skip" and i == 2 else None
                generator = torch.Generator().manual_seed(i)
                reading.backward(tiny_batch(3, seed=i), labels="mc", draws=2, generator=generator)
                if handle:
                    handle.remove()
        found.append(evidence.cost)
    beside, host = found
    assert torch.equal(host.rows["loss"].rows(), beside.rows["loss"].rows())
    assert host.rows["loss"].groups == beside.rows["loss"].groups
    assert len(set(host.rows["loss"].groups)) == (15 if nonfinite == "raise" else 14)
    assert host.skipped == beside.skipped == ([] if nonfinite == "raise" else [(2, 1)])
    assert host.counts == beside.counts
