"""Evidence that is saved, merged, checkpointed, killed and run again in pieces is the evidence of one undisturbed pass."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch

import sst_kernels as sst
from sst_kernels.fisher import Checkpoints, Interrupted, item_seed, storage
from sst_kernels.fisher.storage import read_tensors, write_tensors
from sst_kernels.fisher.structures.moment import dense
from sst_kernels.inputs.filter import Basis
from sst_kernels.testing import error_ratio
from tests.faults import context
from tests.models import lora_layers, tiny_batch, tiny_lora

ITEMS = 6


def of(**options):
    return sst.Evidence.of(tiny_lora(), "safety", about={"model": "tiny", "template": "none"}, **options)


def feed(reading, item):
    """Two label draws of a batch, seeded by its number."""
    generator = torch.Generator().manual_seed(item_seed(0, item))
    reading.backward(tiny_batch(3, seed=item), labels="mc", draws=2, generator=generator)


def feed_named(reading, item):
    batch = tiny_batch(3, seed=100 + item)
    ones = torch.ones(batch["labels"].shape)
    reading.backward(batch, weights={"decide": 2 * ones, "rest": ones})


FEEDS = {"gain": feed_named, "cost": feed}


def collected(evidence=None, gain=range(ITEMS), cost=range(ITEMS), **options):
    evidence = of(**options) if evidence is None else evidence
    for side, items in (("gain", gain), ("cost", cost)):
        if items:
            with evidence.accumulate(side) as reading:
                for item in items:
                    FEEDS[side](reading, item)
    return evidence


@pytest.fixture(scope="module")
def whole():
    return collected()


def basis():
    found = collected(gain=range(2), cost=range(2))
    return Basis.of(found.weights.a, found.gain.moments, found.cost.moments, [0.3, 3.0])


def same_bits(a, b):
    """All state of both: rows, groups, counts, moments."""
    for side in ("gain", "cost"):
        (header, tensors), (other_header, other) = getattr(a, side).pack(), getattr(b, side).pack()
        assert json.loads(json.dumps(header)) == json.loads(json.dumps(other_header))
        assert tensors.keys() == other.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other[name]), (side, name)


def same_patch(a, b, mu=1.0):
    one, other = (e.filter(mu).subspace(folds=2).soft(mu=0.1) for e in (a, b))
    for name, core in one.coordinates.items():
        assert torch.equal(core, other.coordinates[name])


KINDS = {
    "plain": lambda: collected(),
    "bfloat16": lambda: collected(dtype="bfloat16"),
    "sketched": lambda: collected(rank=7),
    "a basis": lambda: collected(basis=basis()),
    "condensed": lambda: collected().condense([0.5, 2.0]),
    "one side": lambda: collected(cost=[]),
    "nothing": lambda: of(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(kind, tmp_path):
    evidence = KINDS[kind]()
    evidence.save(tmp_path / "evidence")
    loaded = sst.Evidence.load(tmp_path / "evidence")
    same_bits(loaded, evidence)
    assert loaded.about == evidence.about
    assert loaded.meta == evidence.meta
    assert (loaded.basis is None) == (evidence.basis is None)
    if kind not in ("one side", "nothing"):
        one, other = evidence.filter(1.0), loaded.filter(1.0)
        assert torch.equal(one.gain.rows(), other.gain.rows())
        assert torch.equal(one.cost.rows(), other.cost.rows())
        assert one.gain.meta == other.gain.meta
        same_patch(evidence, loaded)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "evidence").read_bytes()


def test_two_halves_are_one_pass(whole, tmp_path):
    """Rows in order, groups apart, counts and moments added; halves may come from files, and hold one side alone."""
    first, second = collected(gain=range(3), cost=range(4)), collected(gain=range(3, ITEMS), cost=range(4, ITEMS))
    first.save(tmp_path / "first")
    first = sst.Evidence.load(tmp_path / "first")
    first.merge(second)
    for side in ("gain", "cost"):
        mine, theirs = getattr(first, side), getattr(whole, side)
        assert list(mine.rows) == list(theirs.rows)
        for name, fisher in theirs.rows.items():
            assert torch.equal(mine.rows[name].rows(), fisher.rows())
            assert mine.rows[name].groups == fisher.groups
            assert mine.rows[name].counts == fisher.counts
            assert mine.rows[name].meta == fisher.meta
        assert mine.moments.tokens == theirs.moments.tokens
        for name, moment in theirs.moments.items():
            assert error_ratio(dense(mine.moments[name]), dense(moment)) < 1e-6
    parts = [collected(cost=[]), collected(gain=[]), of()]
    for order in ([0, 1, 2], [2, 1, 0]):
        total = of()
        for i in order:
            total.merge(parts[i])
        same_bits(total, whole)
    assert parts[0].gain.counts.sequences == 3 * ITEMS  # what was merged is not shared with the total
    total.merge(parts[0])
    assert parts[0].gain.counts.sequences == 3 * ITEMS


def others():
    def evidence(model, **options):
        return sst.Evidence.of(model, "safety", **({"about": {"model": "tiny", "template": "none"}} | options))

    yield "another adapter", lambda: evidence(tiny_lora(seed=3)), "fingerprint differs"
    yield "other modules", lambda: evidence(tiny_lora(), modules=".*q_proj"), "fingerprint differs"
    yield (
        "another template",
        lambda: evidence(tiny_lora(), about={"model": "tiny", "template": "chat"}),
        "about differs",
    )
    yield "a basis", lambda: of(basis=basis()), "basis differs"
    yield "another dtype", lambda: of(dtype="bfloat16"), "kept in another dtype"
    yield "sketches", lambda: of(rank=7), "another rank or seed"
    yield "another seed", lambda: of(seed=5), "another rank or seed"
    yield "condensed", lambda: collected().condense([1.0]), "basis differs"


@pytest.mark.parametrize(("make", "message"), [pytest.param(m, t, id=n) for n, m, t in others()])
def test_evidence_about_something_else_is_not_merged(make, message):
    evidence, other = collected(gain=[0], cost=[0]), make()
    other = other if other.gain.rows else collected(other, gain=[1], cost=[1])
    before = evidence.gain.rows["rest"].rows().clone()
    for one, two in ((evidence, other), (other, evidence)):
        with pytest.raises(ValueError, match=message):
            one.merge(two)
    assert torch.equal(evidence.gain.rows["rest"].rows(), before)


def test_merges_that_would_mix_losses_or_labels_change_nothing():
    evidence, other = collected(gain=[0], cost=[0]), of()
    with other.accumulate("gain") as reading:
        feed_named(reading, 1)
    with other.accumulate("cost") as reading:
        reading.backward(tiny_batch(2))
    before = [evidence.gain.counts.sequences, evidence.gain.moments.tokens]
    with pytest.raises(ValueError, match="labels differs"):
        evidence.merge(other)
    assert [evidence.gain.counts.sequences, evidence.gain.moments.tokens] == before
    other = of()
    with other.accumulate("gain") as reading:
        reading.backward(tiny_batch(2))
    with pytest.raises(ValueError, match=r"the losses differ: \['decide', 'rest'\] and \['loss'\]"):
        evidence.merge(other)
    condensed = collected().condense([1.0])
    with pytest.raises(RuntimeError, match="loaded or condensed"):
        condensed.accumulate("gain")


# Files that are damaged, or of something else.


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "evidence"
    collected(gain=[0], cost=[0]).save(path)
    return path


@pytest.mark.parametrize("keep", [0, 7, 9, 100, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(saved, keep, tmp_path):
    raw = saved.read_bytes()
    (tmp_path / "x").write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        sst.Evidence.load(tmp_path / "x")


def test_flipped_bits_are_found(saved, tmp_path):
    raw = saved.read_bytes()
    for position in torch.randint(0, 8 * len(raw), (50,), generator=torch.Generator().manual_seed(0)).tolist():
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << position % 8
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"readable safetensors|damaged|schema"):
            sst.Evidence.load(tmp_path / "x")


def test_files_are_told_apart(saved, tmp_path):
    """Evidence, the checkpoint of its pass, a Fisher: each says what it is to whoever asks for another."""
    evidence = of()
    with evidence.accumulate("gain") as reading:
        feed_named(reading, 0)
        reading.save_checkpoint(tmp_path / "checkpoint")
    with sst.fisher_accumulate(tiny_lora(), "safety", point="reference") as pass_:
        sst.sequence_nll(pass_.model, tiny_batch(2)).backward()
        pass_.save_checkpoint(tmp_path / "fisher checkpoint")
    pass_.save(tmp_path / "fisher")
    for name, kind in (
        ("checkpoint", "evidence checkpoint"),
        ("fisher checkpoint", "checkpoint"),
        ("fisher", "fisher"),
    ):
        with pytest.raises(ValueError, match=f"holds a '{kind}', expected evidence"):
            sst.Evidence.load(tmp_path / name)
        if name != "checkpoint":
            with pytest.raises(ValueError, match=f"holds a '{kind}', expected the checkpoint of an evidence pass"):
                evidence.accumulate("gain", resume=tmp_path / name)
    with pytest.raises(ValueError, match="holds a 'evidence'"):
        sst.Fisher.load(saved)
    with pytest.raises(ValueError, match="holds a 'evidence', expected the checkpoint"):
        evidence.accumulate("gain", resume=saved)
    with pytest.raises(FileNotFoundError):
        sst.Evidence.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        evidence.accumulate("gain", resume=tmp_path / "none")


def nonsense(header):
    """Headers whose checksum is right and whose contents are not."""
    yield "no blocks", header | {"blocks": []}
    yield "blocks that are none", header | {"blocks": None}
    yield "other blocks", header | {"blocks": [["x", 3, 4]]}
    yield "no sides", header | {"sides": {}}
    yield "no scaling", header | {"scaling": None}
    yield "no meta", header | {"meta": None}
    yield "another shape", header | {"blocks": [[n, p, q + 1] for n, p, q in header["blocks"]]}
    gain = header["sides"]["gain"]
    yield "a dtype that is none", header | {"sides": header["sides"] | {"gain": gain | {"dtype": "torch.os"}}}
    widths = dict.fromkeys(gain["moments"]["widths"], 33)
    moments = gain["moments"] | {"widths": widths}
    yield "moments of other widths", header | {"sides": header["sides"] | {"gain": gain | {"moments": moments}}}
    yield "losses that are none", header | {"sides": header["sides"] | {"gain": gain | {"losses": {"loss": {}}}}}
    yield "a basis that is none", header | {"mus": [1.0]}


def test_checksummed_nonsense_is_refused(saved, tmp_path):
    """Whoever writes a file can also write its checksum, so the contents are checked too."""
    header, tensors = read_tensors(saved)
    del header["schema"]
    for name, other in nonsense(header):
        write_tensors(tmp_path / "x", tensors, other)
        with pytest.raises(ValueError, match=r"does not describe evidence|another pass|expected"):
            sst.Evidence.load(tmp_path / "x")
            pytest.fail(name)


def test_checksummed_tensors_of_other_shapes_are_refused(saved, tmp_path):
    header, tensors = read_tensors(saved)
    del header["schema"]
    for key in ("gain/loss/rest/state/joint/rows", "cost/moments/model.layers.0.mlp.down_proj/sum"):
        for part in (tensors[key][:1, :1], tensors[key][:, :1]):
            write_tensors(tmp_path / "x", tensors | {key: part.clone()}, header)
            with pytest.raises(ValueError, match=r"other tensors|expected \[48, 48\]|does not describe"):
                sst.Evidence.load(tmp_path / "x")


# Kill and resume.


def run(folder: Path, kill: int | None = None) -> None:
    """Both sides with a checkpoint after each item, resumed where one stands; SIGKILL before item `kill`."""
    torch.set_num_threads(1)
    evidence = of()
    count = 0
    for side in ("gain", "cost"):
        path, done = folder / f"{side}.checkpoint", folder / side
        if not done.exists():
            resume = path if path.exists() else None
            with evidence.accumulate(side, resume=resume) as reading, Checkpoints(reading, path, every=1) as keep:
                for item in keep.remaining(range(ITEMS)):
                    if count == kill:
                        os.kill(os.getpid(), signal.SIGKILL)
                    FEEDS[side](reading, item)
                    count += 1
            evidence.save(done)
            keep.remove()
        evidence = of()
    total = sst.Evidence.load(folder / "gain")
    total.merge(sst.Evidence.load(folder / "cost"))
    total.save(folder / "evidence")


@pytest.mark.parametrize("kills", [(0,), (3,), (7,), (2, 2, 5)])
def test_killed_and_resumed_passes_have_the_bits_of_undisturbed_ones(kills, whole, tmp_path):
    for kill in kills:
        process = context().Process(target=run, args=(tmp_path, kill))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    run(tmp_path)
    same_bits(sst.Evidence.load(tmp_path / "evidence"), whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cost", "evidence", "gain"]


def test_sigterm_checkpoints_and_the_rest_gives_the_same_bits(tmp_path, whole):
    path = tmp_path / "c"
    evidence = of()
    with (
        pytest.raises(Interrupted, match="after 3 items"),
        evidence.accumulate("cost") as reading,
        Checkpoints(reading, path, identity="these") as keep,
    ):
        for item in keep.remaining(range(ITEMS)):
            feed(reading, item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert evidence.cost.counts.sequences == 0
    with evidence.accumulate("cost", resume=path) as reading, Checkpoints(reading, path, identity="these") as keep:
        assert reading.progress == {"items": 3, "identity": "these"}
        for item in keep.remaining(range(ITEMS)):
            feed(reading, item)
    collected(evidence, cost=[])
    same_bits(evidence, whole)
    with pytest.raises(ValueError, match="'these', this pass has 'those'"):
        Checkpoints(evidence.accumulate("cost", resume=path), path, identity="those").__enter__()


@pytest.mark.parametrize(
    ("options", "side", "differing"),
    [
        ({}, "gain", "side"),
        ({"dtype": "bfloat16"}, "cost", "dtype"),
        ({"rank": 7}, "cost", "rank"),
        ({"seed": 4}, "cost", "seed"),
        ({"modules": ".*q_proj"}, "cost", "fingerprint"),
        ({"basis": "one"}, "cost", "basis"),
    ],
)
def test_checkpoints_of_other_passes_are_refused(options, side, differing, tmp_path):
    with of().accumulate("cost") as reading:
        feed(reading, 0)
        reading.save_checkpoint(tmp_path / "c")
    options = {key: basis() if key == "basis" else value for key, value in options.items()}
    with pytest.raises(ValueError, match=rf"c: the saved state is of another pass: .*{differing}"):
        of(**options).accumulate(side, resume=tmp_path / "c")


def test_checkpoints_whose_contents_are_nonsense_are_refused(tmp_path):
    with of().accumulate("cost") as reading:
        feed(reading, 0)
        reading.save_checkpoint(tmp_path / "c")
    header, tensors = read_tensors(tmp_path / "c")
    del header["schema"]
    for change in ({"side": {}}, {"reading": None}, {"side": header["side"] | {"losses": {"loss": {}}}}):
        write_tensors(tmp_path / "c", tensors, header | change)
        with pytest.raises(ValueError, match=r"c: its header does not describe a pass|another pass"):
            of().accumulate("cost", resume=tmp_path / "c")


def test_checkpoints_are_taken_between_batches(tmp_path):
    evidence = of()
    with evidence.accumulate("gain") as reading:
        loss = sst.sequence_nll(reading.model, tiny_batch(2))
        with pytest.raises(RuntimeError, match="between batches"):
            reading.save_checkpoint(tmp_path / "c")
        loss.backward()
        reading.save_checkpoint(tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_disk_that_is_full_leaves_what_was_there(whole, tmp_path, monkeypatch):
    whole.save(tmp_path / "e")
    before = (tmp_path / "e").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(sst.fisher.StorageError, match="the previous one is intact"):
        whole.save(tmp_path / "e")
    assert (tmp_path / "e").read_bytes() == before


# Out of memory.


def fail_once(model, where, call=1):
    """OutOfMemoryError in the `call`-th forward or backward pass through a layer in the middle of the model, once."""
    layer = lora_layers(model, "safety")["model.layers.1.self_attn.o_proj"]
    count = [0]

    def maybe(*_):
        count[0] += 1
        if count[0] == call:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    def backward(_m, _i, y):
        if y.requires_grad:
            y.register_hook(maybe)

    return layer.register_forward_hook(maybe if where == "forward" else backward)


def halves(batch):
    middle = (len(batch["labels"]) + 1) // 2
    return [{k: v[s] for k, v in batch.items()} for s in (slice(0, middle), slice(middle, None))]


FAULTS = {
    "forward": [("forward", 1)],
    "backward": [("backward", 1)],
    "second draw": [("backward", 2)],
    "forward, then backward of a half": [("forward", 1), ("backward", 1)],
    "twice in the forward pass": [("forward", 1), ("forward", 1)],
}


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize("side", ["gain", "cost"])
def test_samples_that_ran_out_of_memory_are_run_again_in_pieces(faults, side):
    """Rows, groups and counts of a pass that met these pieces in the first place, and moments that hold every token once."""
    model = tiny_lora()
    evidence = sst.Evidence.of(model, "safety")
    pieces, failures = [], list(FAULTS[faults])
    settings = {"labels": "mc", "draws": 2} if side == "cost" else {}

    def weights(batch):
        ones = torch.ones(batch["labels"].shape)
        return {"weights": {"a": ones, "b": 3 * ones}} if side == "gain" else {}

    def step(reading, batch):
        seed = torch.Generator().manual_seed(int(batch["input_ids"].sum()))
        reading.backward(batch, **settings, **weights(batch), generator=seed)

    with evidence.accumulate(side) as reading:
        step(reading, tiny_batch(2, seed=9))
        waiting = [tiny_batch(5)]
        while waiting:
            batch = waiting.pop(0)
            handle = fail_once(model, *failures.pop(0)) if failures else None
            try:
                step(reading, batch)
                pieces.append(batch)
            except torch.OutOfMemoryError:
                reading.abandon()
                waiting = halves(batch) + waiting
                with pytest.raises(RuntimeError, match="were abandoned and not run again"):
                    reading._none_abandoned()
            finally:
                if handle is not None:
                    handle.remove()
        step(reading, tiny_batch(2, seed=11))
    assert len(pieces) == 1 + len(FAULTS[faults])
    plain = sst.Evidence.of(tiny_lora(), "safety")
    with plain.accumulate(side) as reading:
        for batch in (tiny_batch(2, seed=9), *pieces, tiny_batch(2, seed=11)):
            step(reading, batch)
    mine, theirs = getattr(evidence, side), getattr(plain, side)
    assert mine.moments.tokens == theirs.moments.tokens
    for name, fisher in theirs.rows.items():
        assert torch.equal(mine.rows[name].rows(), fisher.rows())
        assert mine.rows[name].groups == fisher.groups
        assert mine.rows[name].counts == fisher.counts
    for name, moment in theirs.moments.items():  # sums over other pieces
        assert error_ratio(dense(mine.moments[name]), dense(moment)) < 1e-6


def test_what_was_abandoned_has_to_come_next(tmp_path):
    model = tiny_lora()
    evidence = sst.Evidence.of(model, "safety")

    def failed(reading):
        handle = fail_once(model, "backward")
        with pytest.raises(torch.OutOfMemoryError):
            reading.backward(tiny_batch(4))
        handle.remove()
        reading.abandon()

    with (
        pytest.raises(RuntimeError, match="4 samples were abandoned and not run again"),
        evidence.accumulate("gain") as reading,
    ):
        reading.backward(tiny_batch(2))
        failed(reading)
        with pytest.raises(RuntimeError, match="4 samples were abandoned"):
            reading.save_checkpoint(tmp_path / "c")
    with (
        pytest.raises(RuntimeError, match="the same 4 samples are run again, in pieces, before others: got 5"),
        evidence.accumulate("gain") as reading,
    ):
        failed(reading)
        reading.backward(tiny_batch(5))
    assert evidence.gain.counts.sequences == 0


def test_rows_that_may_be_held_in_part_are_not_gone_on_with(monkeypatch):
    """Memory runs out while the rows of the second loss are added."""
    evidence, batch = of(), tiny_batch(2)
    ones = torch.ones(batch["labels"].shape)
    with (
        pytest.raises(MemoryError, match="batch 0 failed while its rows were added"),
        evidence.accumulate("gain") as reading,
    ):
        add = reading._side.add

        def full(name, *rest):
            if name == "b":
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
            add(name, *rest)

        monkeypatch.setattr(reading._side, "add", full)
        with pytest.raises(torch.OutOfMemoryError):
            reading.backward(batch, weights={"a": ones, "b": ones})
        reading.abandon()
    assert evidence.gain.counts.sequences == 0


def test_what_nobody_holds_any_more_is_freed_at_once():
    """Gradients of hundreds of prompts are gigabytes: they must not wait for the garbage collector."""
    model = tiny_lora(adapters=("task", "safety"))
    gc.disable()
    try:
        evidence = sst.Evidence.of(model, "safety")
        for side, seed in (("gain", 1), ("cost", 2)):
            with evidence.accumulate(side) as reading:
                for i in range(3):
                    reading.backward(tiny_batch(4, seed=10 * seed + i))
        del reading
        condensed = evidence.condense()
        kept = [weakref.ref(x) for x in (evidence, evidence.gain, evidence.gain.moments, evidence.cost)]
        del evidence
        assert [ref() for ref in kept] == [None] * len(kept)
        assert condensed.filter(3.0).gain.counts.sequences == 12
    finally:
        gc.enable()
