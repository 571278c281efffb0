"""Evidence, chosen afterwards, against the two passes over a model that carries the filtered patch."""

from __future__ import annotations

import pytest
import torch

import sst_kernels as sst
from sst_kernels.evidence import Reading
from sst_kernels.fisher.structures.moment import dense
from sst_kernels.testing import error_ratio, half_ulp, tolerance
from tests.models import lora_layers, one_by_one, position_ids, tiny_batch, tiny_lora

ADAPTERS = ("task", "safety")


def batches(seed, n=3, size=4, **options):
    return [tiny_batch(size, seed=seed + i, **options) for i in range(n)]


def opening(batch):
    return sst.opening_weights(batch["labels"])


def collect(evidence, harm, benign, weigh=opening, **settings):
    with evidence.accumulate("gain") as reading:
        for batch in harm:
            reading.backward(batch, weights=None if weigh is None else weigh(batch))
    with evidence.accumulate("cost") as reading:
        for batch in benign:
            reading.backward(batch, **settings)
    return evidence


def read(model, harm, benign, *, weigh=opening, **options):
    return collect(sst.Evidence.of(model, "safety", **options), harm, benign, weigh)


def two_passes(model, harm, benign, mu, *, weigh=opening):
    """Input moments, filtered reads on the model, then both Fishers: (A', gain, cost)."""
    sides = []
    for data in (harm, benign):
        with torch.no_grad(), sst.input_moments(model, "safety", rank=512) as moments:
            for batch in data:
                model(**{k: v for k, v in batch.items() if k != "labels"})
        sides.append(moments)
    reads = sst.filter_inputs(*sides, mu)
    layers = lora_layers(model, "safety")
    before = {name: layer.lora_A["safety"].weight.data.clone() for name, layer in layers.items()}
    for name, a in reads.items():
        layers[name].lora_A["safety"].weight.data = a
    fishers = []
    for data, weighted in ((harm, weigh), (benign, None)):
        with sst.fisher_accumulate(model, "safety", point="reference") as pass_:
            for batch in data:
                weights = None if weighted is None else weighted(batch)
                sst.sequence_nll(model, batch, weights=weights).backward()
        fishers.append(pass_.fisher)
    for name, a in before.items():
        layers[name].lora_A["safety"].weight.data = a
    return reads, *fishers


def assert_same_adapter(evidence, expected, mu):
    """A' and ΔW' of the soft patch, within 1e-5 of what two passes give."""
    reads, gain, cost = expected
    chosen = evidence.filter(mu)
    for side in ("gain", "cost"):
        assert getattr(chosen, side).counts == (gain if side == "gain" else cost).counts
    for name, a in reads.items():
        torch.testing.assert_close(chosen.lora_A[name], a.float(), rtol=1e-5, atol=1e-6)
    patch = chosen.subspace(folds=2).soft(mu=0.1)
    other = sst.subspace(gain, cost, folds=2).soft(mu=0.1)
    for name, (a, b, c) in chosen.factors(patch.coordinates).items():
        assert c == evidence.weights.scaling[name]
        old = evidence.weights.b[name].double() @ other.coordinates[name] @ reads[name].double()
        assert float((b.double() @ a.double() - old).norm()) <= 1e-5 * float(old.norm()), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_the_adapter_is_that_of_two_passes(kind, padding):
    """The Llama has grouped queries, the Qwen experts beside its adapted attention."""
    model = tiny_lora(kind, adapters=ADAPTERS)
    harm, benign = batches(1, padding=padding), batches(20, padding=padding)
    evidence = read(model, harm, benign)
    for mu in (0.3, 3.0):
        assert_same_adapter(evidence, two_passes(model, harm, benign, mu), mu)


@pytest.mark.parametrize("others", [("safety",), ("safety", "task")], ids=["patch alone", "beside a task adapter"])
def test_other_adapters_stay_as_they_are(others):
    """The task adapter counts where it is active, and not where it is not; afterwards the model is what it was."""
    model, batch = tiny_lora(adapters=ADAPTERS), tiny_batch(4)
    model.base_model.set_adapter(list(others))
    before = model(**batch).logits
    evidence = read(model, batches(1), batches(20))
    assert_same_adapter(evidence, two_passes(model, batches(1), batches(20), 3.0), 3.0)
    assert torch.equal(model(**batch).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(layer.active_adapters == list(others) for layer in lora_layers(model, "safety").values())


def test_a_task_adapter_changes_the_evidence():
    rows = []
    for others in (["safety"], ["safety", "task"]):
        model = tiny_lora(adapters=ADAPTERS)
        model.base_model.set_adapter(others)
        rows.append(read(model, batches(1), batches(20)).filter(3.0).gain.rows())
    assert error_ratio(*rows) > 0.1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, frozen):
    """With two losses and two draws, so that one forward pass is computed again for each of two backward passes."""
    halves = lambda batch: {"first": opening(batch), "rest": 4.0 - opening(batch)}  # noqa: E731
    found = []
    for checkpointing in (False, True):
        model = tiny_lora(adapters=ADAPTERS)
        model.requires_grad_(not frozen)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        settings = {"labels": "mc", "draws": 2, "generator": torch.Generator().manual_seed(3)}
        evidence = sst.Evidence.of(model, "safety")
        found.append(collect(evidence, batches(1), batches(20), halves, **settings))
    for side in ("gain", "cost"):
        plain, again = (getattr(evidence, side) for evidence in found)
        assert plain.counts == again.counts
        assert plain.moments.tokens == again.moments.tokens
        for name, fisher in plain.rows.items():
            assert error_ratio(again.rows[name].rows(), fisher.rows()) < 1e-5
        for name, moment in plain.moments.items():
            assert error_ratio(dense(again.moments[name]), dense(moment)) < 1e-6
    model = tiny_lora(adapters=ADAPTERS)
    assert_same_adapter(read(model, batches(1), batches(20)), two_passes(model, batches(1), batches(20), 3.0), 3.0)


def packed(batch, by):
    samples = one_by_one(batch)
    lengths = torch.tensor([s["input_ids"].shape[1] for s in samples])
    out = {
        "input_ids": torch.cat([s["input_ids"] for s in samples], 1),
        "labels": torch.cat([s["labels"] for s in samples], 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "use_cache": False,
    }
    if by == "cu_seq_lens_q":
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        out["cu_seq_lens_q"] = starts.to(torch.int32)
    return out


@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens_q"])
def test_packed_batches(by):
    """Against two packed passes, and against the same samples unpacked."""
    model = tiny_lora(adapters=ADAPTERS, attention="eager" if by == "position_ids" else "sdpa")
    plain = [batches(seed) for seed in (1, 20)]
    harm, benign = ([packed(batch, by) for batch in data] for data in plain)
    evidence = read(model, harm, benign, weigh=None)
    assert_same_adapter(evidence, two_passes(model, harm, benign, 3.0, weigh=None), 3.0)
    unpacked = read(model, *([b | {"position_ids": position_ids(b)} for b in data] for data in plain), weigh=None)
    for side in ("gain", "cost"):
        mine, theirs = (getattr(e, side) for e in (evidence, unpacked))
        assert mine.counts == theirs.counts
        assert error_ratio(mine.rows["loss"].rows(), theirs.rows["loss"].rows()) < 1e-5


def test_modules_that_read_one_tensor_share_its_moments():
    model = tiny_lora(adapters=ADAPTERS)
    evidence = read(model, batches(1), batches(20))
    with torch.no_grad(), sst.input_moments(model, "safety", rank=512) as moments:
        for batch in batches(1):
            model(**batch)
    assert evidence.gain.moments.shared == moments.shared
    assert evidence.gain.moments.nbytes == moments.nbytes == 2 * 4 * (3 * 32**2 + 48**2)
    assert evidence.gain.moments.tokens == moments.tokens == sum(int(b["attention_mask"].sum()) for b in batches(1))
    for name, moment in moments.items():
        assert torch.equal(dense(evidence.gain.moments[name]), dense(moment))


@pytest.mark.parametrize("rank", [7, 12])
def test_sketched_moments_filter_as_in_two_passes(rank):
    """One seed, one test matrix: sketches of both ways are the same, and so are the reads."""
    model = tiny_lora(adapters=ADAPTERS)
    evidence = read(model, batches(1), batches(20), rank=rank)
    sides = []
    for seed in (1, 20):
        with torch.no_grad(), sst.input_moments(model, "safety", rank=rank) as moments:
            for batch in batches(seed):
                model(**batch)
        sides.append(moments)
    for name, a in sst.filter_inputs(*sides, 3.0).items():
        torch.testing.assert_close(evidence.filter(3.0).lora_A[name], a, rtol=1e-5, atol=1e-6)


def test_rows_kept_in_bfloat16_are_rounded_once():
    """u = 2^-9 of each entry, so that a core gradient is wrong by at most u Σ |G| |A'|."""
    model, unit = tiny_lora(adapters=ADAPTERS), half_ulp(torch.bfloat16)
    full, short = (read(model, batches(1), batches(20), dtype=dtype) for dtype in ("float32", "bfloat16"))
    for side in ("gain", "cost"):
        rows = getattr(full, side).rows["loss"].rows()
        kept = getattr(short, side).rows["loss"].rows()
        assert kept.dtype == torch.bfloat16
        assert torch.equal(kept, rows.bfloat16())
        assert getattr(short, side).rows["loss"].nbytes * 2 == getattr(full, side).rows["loss"].nbytes
    one, other = full.filter(3.0), short.filter(3.0)
    at = 0
    for block in full.gain.blocks:
        a = one.lora_A[block.name]
        assert torch.equal(a, other.lora_A[block.name])
        g = full.gain.rows["loss"].rows()[:, full.gain.columns[block.name]].reshape(-1, *block.shape)
        where = slice(at, at + block.shape[0] ** 2)
        change = other.gain.rows()[:, where] - one.gain.rows()[:, where]
        allowed = (unit + tolerance(block.shape[1])) * (g.abs() @ a.abs().mT).flatten(1)
        assert bool((change.abs() <= allowed).all()), block.name
        at = where.stop
    assert 0 < error_ratio(other.gain.rows(), one.gain.rows()) < unit * 4


def test_a_model_in_bfloat16(monkeypatch):
    """Two passes round A' and h = A'x to bfloat16, evidence rounds neither, and both sum e hᵀ of the same bits of e and x:
    |h − h'| ≤ 2u |A'||x| for every token."""
    sizes, take = {}, Reading._take

    def watched(reading, current, site, signal):
        e, x = (current.flat(site, t).float().abs() for t in (signal.e, signal.right))
        sums = [e[begin:end].mT @ x[begin:end] for begin, end in current.layout.spans.tolist()]
        sizes.setdefault(site.name, []).append(torch.stack(sums))
        take(reading, current, site, signal)

    monkeypatch.setattr(Reading, "_take", watched)
    model = tiny_lora(adapters=ADAPTERS).bfloat16()
    evidence = read(model, batches(1), batches(20))
    reads, gain, _ = two_passes(model, batches(1), batches(20), 3.0)
    chosen, unit = evidence.filter(3.0), half_ulp(torch.bfloat16)
    for name, a in reads.items():
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(chosen.lora_A[name], a.float(), rtol=unit, atol=1e-6)
    rows, other, at = chosen.gain.rows(), gain.rows(), 0
    for block in evidence.gain.blocks:
        where = slice(at, at := at + block.shape[0] ** 2)
        whole = torch.cat(sizes[block.name])[: len(rows)]  # the gain's batches came first
        allowed = (2 * unit + tolerance(block.shape[1])) * (whole @ chosen.lora_A[block.name].abs().mT).flatten(1)
        assert bool(((rows - other)[:, where].abs() <= allowed).all()), block.name
    exact = read(model.double(), batches(1), batches(20)).filter(3.0).gain.rows()
    assert 0 < error_ratio(rows, exact) < 64 * torch.finfo(torch.bfloat16).eps  # gradients of a model in bfloat16
