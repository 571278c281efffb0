"""Memory estimates against what is allocated, and refusals before the first batch."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sst_kernels import Evidence, fisher_accumulate, input_moments, sequence_nll, subspace
from sst_kernels.fisher import STRUCTURES, Block, Counts, TokenBatch, make_structure, memory
from sst_kernels.fisher.estimate import Estimate, estimate_moments
from sst_kernels.fisher.lora import find_sites
from sst_kernels.fisher.memory import estimate
from sst_kernels.fisher.structures.moment import SecondMoment
from sst_kernels.inputs.moments import columns, one_per_input
from sst_kernels.subspace.memory import estimate_solve
from tests.models import tiny_batch, tiny_lora

CASES = [
    ("full", (16, 64), 1000, 10, {}),
    ("full", (16, 64), 1024, 8, {}),
    ("full", (16, 16), 1000, 10, {"rows": "fold"}),
    ("full", (16, 16), 200, 10, {"rows": "fold"}),
    ("diagonal", (256, 512), 40, 8, {}),
    ("diagonal", (256, 512), 40, 8, {"centred": True}),
    ("vila", (256, 512), 40, 8, {}),
    ("kronecker", (256, 512), 40, 8, {}),
    ("kronecker_lowrank", (256, 512), 40, 8, {"rank": 64}),
    ("eigen_kronecker", (128, 256), 40, 8, {}),
    ("lowrank", (64, 256), 400, 10, {"rank": 50}),
    ("lowrank", (64, 256), 80, 10, {"rank": 50}),
    ("kronecker_svd", (16, 64), 700, 10, {}),
]


def tokens(shape: tuple[int, int], samples: int, length: int = 4) -> TokenBatch:
    ends = torch.arange(1, samples + 1) * length
    left, right = (torch.randn(samples * length, d) for d in shape)
    counts = Counts(samples, samples * length, samples * length)
    return TokenBatch(left, right, torch.stack([ends - length, ends], 1), torch.ones(samples), counts)


def measured_peak(function):
    """The function's result and the most bytes that torch held at once for it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = function()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):  # in their own order within one tick of the clock
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak


@pytest.mark.parametrize(("kind", "shape", "samples", "batch", "options"), CASES)
def test_estimates_agree_with_what_is_allocated(kind, shape, samples, batch, options):
    batches = [tokens(shape, batch) for _ in range(samples // batch)]
    extra = {}
    if kind == "eigen_kronecker":
        extra["basis"] = make_structure("kronecker", shape)
        extra["basis"].update(tokens(shape, 8))

    def accumulate():
        structure = make_structure(kind, shape, **options, **extra)
        for part in batches:
            structure.update(part)
            part.rows = None
        return structure

    structure, peak = measured_peak(accumulate)
    made = estimate(kind, [Block("x", "x", shape)], samples, batch=batch, space="factor", options=options)
    assert made.state == pytest.approx(structure.nbytes, rel=0.01)
    assert made.peak == pytest.approx(peak, rel=0.1, abs=64 * 1024)


def test_every_structure_can_be_estimated():
    for kind in STRUCTURES:
        made = estimate(kind, [Block("x", "x", (8, 8))], 100)
        assert 0 < made.state <= made.peak
    with pytest.raises(ValueError, match="structure: expected one of"):
        estimate("dense", [Block("x", "x", (8, 8))], 100)


def test_a_pass_takes_what_was_estimated():
    model, batches = tiny_lora(), [tiny_batch(5, seed=i) for i in range(4)]
    for options in ({}, {"structure": "lowrank", "rank": 4}, {"scope": "module"}, {"structure": "diagonal"}):
        with fisher_accumulate(model, "safety", sequences=20, **options) as pass_:
            for batch in batches:
                model(**batch).loss.backward()
        given = {k: v for k, v in options.items() if k == "rank"}
        shape = {k: v for k, v in options.items() if k == "scope"}
        kind = options.get("structure", "full")
        made = estimate(kind, list(pass_.fisher.blocks.values()), 20, batch=5, options=given, **shape)
        assert made.state == pytest.approx(pass_.fisher.nbytes, rel=0.1)


def test_passes_that_do_not_fit_are_refused_before_the_first_batch(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1 << 20)
    with pytest.raises(
        MemoryError,
        match=r'would take .* on cpu and 1\.00 MiB are available; these would fit: .*rank=64 .*"diagonal".*SST_MEMORY=warn',
    ):
        fisher_accumulate(tiny_lora(), "safety", sequences=10**6)
    fisher_accumulate(tiny_lora(), "safety", sequences=10)
    monkeypatch.setattr(memory, "available", lambda device: 10)
    with pytest.raises(MemoryError, match="use fewer sequences"):
        fisher_accumulate(tiny_lora(), "safety", sequences=10**6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("rank", [None, 9, 4])
def test_input_moments_take_what_was_estimated(kind, rank):
    """Which modules read one tensor is known before the model is run, where it says how it is split over devices."""
    model = tiny_lora(kind)
    readers = one_per_input(model, find_sites(model, "safety"))
    with torch.no_grad(), input_moments(model, "safety", rank=rank) as moments:
        model(input_ids=tiny_batch(2)["input_ids"])
    assert [site.name for site in readers] == list(dict.fromkeys(moments.shared.values()))
    widths = [moments.lora_A[site.name].shape[1] for site in readers]
    made = estimate_moments([(d, columns(d, rank)) for d in widths])
    assert made.state == pytest.approx(moments.nbytes, rel=0.02)


@pytest.mark.parametrize("shapes", [[(512, 512), (300, 300)], [(1100, 96), (640, 640), (1100, 96), (700, 96)]])
def test_moments_are_held_and_drawn_as_estimated(shapes):
    batches = [(torch.randn(4, d), d, columns) for d, columns in shapes]
    spans = torch.tensor([[0, 4]])

    def add():
        moments = [SecondMoment(d, columns, 7, x.device) for x, d, columns in batches]
        for moment, (x, _, _) in zip(moments, batches):
            moment.add(x, spans, None)
        return moments

    moments, peak = measured_peak(add)
    made = estimate_moments(shapes)
    assert made.state == pytest.approx(sum(m.sum.nbytes for m in moments), rel=0.01)
    assert made.peak == pytest.approx(peak, rel=0.1)


def test_input_moments_that_do_not_fit_are_refused_before_the_first_batch(monkeypatch):
    layer = nn.Sequential(nn.Linear(600, 8))
    model = get_peft_model(layer, LoraConfig(target_modules=["0"], r=2), adapter_name="safety")
    monkeypatch.setattr(memory, "available", lambda device: 1200 << 10)
    would_take = (
        r"inputs would take 1\.37 MiB on cpu and 1\.17 MiB are available; these would fit: rank=64 \(1\.04 MiB\);"
    )
    with pytest.raises(MemoryError, match=would_take):
        input_moments(model, "safety")
    input_moments(model, "safety", rank=64)
    monkeypatch.setattr(memory, "available", lambda device: 300 << 10)
    with pytest.raises(MemoryError, match="are available; take fewer modules"):
        input_moments(model, "safety", rank=64)
    input_moments(model, "safety", rank=16)


def test_ranks_need_room_for_the_total_beside_their_own_rows(monkeypatch):
    """What one process brings fits, and what four of them gather does not."""
    with fisher_accumulate(tiny_lora(), "safety", sequences=10) as pass_:
        row = 4 * pass_.fisher.joint.size
        monkeypatch.setattr(memory, "available", lambda device: 45 * row)
        memory.reserve(pass_.fisher, 9, {}, ranks=4)
        with pytest.raises(MemoryError, match="fit"):
            memory.reserve(pass_.fisher, 10, {}, ranks=4)
        sequence_nll(pass_.model, tiny_batch(2)).backward()


def test_evidence_of_two_losses_needs_room_for_the_rows_of_both(monkeypatch):
    evidence = Evidence.of(tiny_lora(adapters=("task", "safety")), "safety")
    row = 4 * evidence.gain.width
    monkeypatch.setattr(memory, "available", lambda device: 25 * row)
    with pytest.raises(MemoryError, match="gradients that an evidence keeps"):
        evidence.accumulate("gain", sequences=13, losses=2)
    evidence.accumulate("gain", sequences=12, losses=2)
    evidence.accumulate("gain", sequences=13)


def test_reserved_rows_are_never_copied():
    model = tiny_lora()
    with fisher_accumulate(model, "safety", sequences=6) as pass_:
        model(**tiny_batch(3)).loss.backward()
        first = pass_.fisher.rows().data_ptr()
        model(**tiny_batch(3, seed=1)).loss.backward()
    assert pass_.fisher.rows().data_ptr() == first


def test_estimates_add_with_one_temporary_at_a_time():
    assert Estimate(10, 15) + Estimate(1, 3) == Estimate(11, 16)


@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize(("metric", "folds"), [("kronecker", 4), ("kronecker", 12), ("frobenius", 4)])
@pytest.mark.parametrize(("rank", "rows"), [(12, (24, 48)), (3, (70, 60))])  # fewer rows than coordinates, and more
def test_solves_take_what_was_estimated(scope, rank, rows, metric, folds):
    model = tiny_lora(r=rank)
    fishers = []
    for point, count in zip(("patched", "reference"), rows):
        with fisher_accumulate(model, "safety", point=point) as pass_:
            model(**tiny_batch(count)).loss.backward()
        fishers.append(pass_.fisher)
    solved, peak = measured_peak(lambda: subspace(*fishers, scope=scope, metric=metric, folds=folds))
    sizes = [b.size for b in fishers[0].blocks.values()]
    assert len(solved.values) > 0
    estimated = estimate_solve(sizes, *rows, scope=scope, metric=metric, folds=folds)
    assert estimated == pytest.approx(peak, rel=0.1, abs=64 * 1024)


def test_a_refusal_can_be_made_a_warning(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1 << 10)
    monkeypatch.setenv("SST_MEMORY", "warn")
    with pytest.warns(UserWarning, match=r"would take .* and 0\.00 MiB are available; use fewer"):
        fisher_accumulate(tiny_lora(), "safety", sequences=100)
    monkeypatch.setenv("SST_MEMORY", "off")
    with pytest.raises(ValueError, match='SST_MEMORY: expected "refuse" or "warn", got \'off\''):
        fisher_accumulate(tiny_lora(), "safety", sequences=0)


def test_rows_that_cannot_be_had_in_one_piece_are_a_memory_error(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: None)
    with pytest.raises(MemoryError, match="in one piece are not free on cpu"):
        fisher_accumulate(tiny_lora(), "safety", sequences=1 << 50)


def test_each_device_holds_its_own_modules(monkeypatch):
    """What is refused on one GPU fits on two."""
    model = tiny_lora()
    with fisher_accumulate(model, "safety", structure="kronecker", space="factor") as pass_:
        sequence_nll(model, tiny_batch(2)).backward()
    parts = list(pass_.fisher.values())
    room = sum(part.nbytes for part in parts) * 3 // 4
    monkeypatch.setattr(memory, "available", lambda device: room)
    with pytest.raises(MemoryError, match="on cpu"):
        memory.reserve(pass_.fisher, 2, {})
    for part in parts[::2]:
        monkeypatch.setattr(part, "device", torch.device("meta"))
    memory.reserve(pass_.fisher, 2, {})
