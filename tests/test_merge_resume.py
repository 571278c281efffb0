"""sst-merge over interruptions, ranks and small memories: the same numbers as an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

import sst_kernels as sst
from sst_kernels.fisher import Interrupted, structures
from sst_merge.errors import MergeError, OutputError
from sst_merge.io.data import batches, load_dataset
from sst_merge.progress import Reporter
from sst_merge.run import collect as reading
from sst_merge.run.checkpoints import Continuity, continuing
from sst_merge.run.collect import collect
from sst_merge.run.passes import fisher_pass
from sst_merge.session import open_session
from sst_merge.specs import Collection
from tests import merge_cases as cases


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "safety", seed=2, target_modules=["q_proj", "o_proj"], scale=0.2)
    cases.write_jsonl(root / "data.jsonl", cases.pairs(9, "bake"))
    return root


@pytest.fixture
def session(root):
    return open_session(str(root / "model"), root / "safety", device="cpu", reporter=Reporter(quiet=True))


@pytest.fixture
def data(root, session):
    return load_dataset(root / "data.jsonl", session.tokenizer)


OPTIONS = {"name": "benign", "point": "reference", "labels": "mc", "draws": 2, "tokens_per_batch": 200}


def rows(fisher: sst.Fisher) -> torch.Tensor:
    return fisher.rows()


def test_checkpoints_of_a_run_that_works_are_left_alone(tmp_path):
    output = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from sst_merge.run.checkpoints import Continuity\n"
        "keep = Continuity.beside(Path(sys.argv[1]), 1, True); print('ready', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(output)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(OutputError, match="another run is at work there"):
        Continuity.beside(output, 1, True)
    with pytest.raises(OutputError, match="another run is at work there"):  # and not advice to remove its checkpoints
        Continuity.beside(output, 1, False)
    other.kill()
    other.communicate()
    Continuity.beside(output, 1, True).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_leaves_its_checkpoints_to_others(tmp_path):
    output, started = tmp_path / "out", tmp_path / ".out-checkpoints" / "gain.checkpoint"
    with pytest.raises(RuntimeError), continuing(output, 1, False):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), continuing(output, 1, False):
        started.touch()
        raise RuntimeError
    with continuing(output, None, True) as keep:
        assert keep.begun
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_pass_goes_on_to_the_same_bits(session, data, tmp_path, monkeypatch):
    expected = fisher_pass(session, data, **OPTIONS)
    keep = Continuity.beside(tmp_path / "out", 1, False)
    run, calls = reading.Halving.__call__, []

    def terminated(self, batch, seed):
        run(self, batch, seed)
        calls.append(seed)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(reading.Halving, "__call__", terminated)
    with pytest.raises(Interrupted, match="after 3 items"):
        fisher_pass(session, data, **OPTIONS, continuity=keep)
    with pytest.raises(OutputError, match="unfinished run: go on with --resume"):
        Continuity.beside(tmp_path / "out", 1, False)
    resumed = fisher_pass(session, data, **OPTIONS, continuity=Continuity.beside(tmp_path / "out", None, True))
    assert torch.equal(rows(resumed), rows(expected))
    assert resumed.groups == expected.groups
    assert len(calls) == len(set(calls))
    again = fisher_pass(session, data, **OPTIONS, continuity=Continuity.beside(tmp_path / "out", None, True))
    assert torch.equal(rows(again), rows(expected))
    with pytest.raises(MergeError, match="other data, order or seed"):
        fisher_pass(session, data, **OPTIONS, seed=1, continuity=Continuity.beside(tmp_path / "out", None, True))
    keep.remove()
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_have_no_room_of_their_own(tmp_path):
    (tmp_path / ".out-checkpoints").touch()
    with pytest.raises(OutputError, match=r"\.out-checkpoints: cannot be created \(File exists\)"):
        Continuity.beside(tmp_path / "out", 1, False)


SPEC = Collection(tokens_per_batch=60)


def kept(evidence: sst.Evidence) -> list[torch.Tensor]:
    sides = [evidence.gain, evidence.cost]
    return [t for side in sides for t in (*(f.rows() for f in side.rows.values()), *side.moments.pack()[1].values())]


@pytest.mark.parametrize("during", ["harm", "benign"])
def test_an_interrupted_reading_goes_on_to_the_same_bits(during, session, data, tmp_path, monkeypatch):
    expected = collect(session, data, data[:4], SPEC)
    after = 2 if during == "harm" else len(batches(data, 60)) + 1
    keep = Continuity.beside(tmp_path / "out", 1, False)
    run, calls = reading.Halving.__call__, []

    def terminated(self, batch, seed):
        run(self, batch, seed)
        calls.append(batch)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(reading.Halving, "__call__", terminated)
    with pytest.raises(Interrupted, match=r"after \d items"):
        collect(session, data, data[:4], SPEC, keep)
    before = len(calls)
    resumed = collect(session, data, data[:4], SPEC, Continuity.beside(tmp_path / "out", None, True))
    assert 0 < len(calls) - before < before + len(calls)
    assert all(torch.equal(a, b) for a, b in zip(kept(resumed), kept(expected), strict=True))
    assert resumed.cost.rows["loss"].groups == expected.cost.rows["loss"].groups
    again = collect(session, data, data[:4], SPEC, Continuity.beside(tmp_path / "out", None, True))
    assert all(torch.equal(a, b) for a, b in zip(kept(again), kept(expected), strict=True))
    other = Collection(tokens_per_batch=60, seed=1)
    with pytest.raises(MergeError, match="of another pass"):
        collect(session, data, data[:4], other, Continuity.beside(tmp_path / "out", None, True))


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("during", ["forward", "backward"])
def test_batches_that_memory_does_not_hold_are_halved(during, session, data, monkeypatch, capsys):
    options = OPTIONS | {"labels": "empirical", "draws": 1, "tokens_per_batch": 400}
    expected = fisher_pass(session, data, **options)
    nll, shapes = sst.sequence_nll, []

    def small_memory(model, batch, **rest):
        shapes.append(tuple(batch["input_ids"].shape))
        small = batch["input_ids"].numel() <= 150
        if during == "forward" and not small:
            no_memory()
        loss = nll(model, batch, **rest)
        if not small:
            loss.register_hook(no_memory)
        return loss

    monkeypatch.setattr(sst, "sequence_nll", small_memory)
    session.reporter = Reporter()
    halved = fisher_pass(session, data, **options)
    assert halved.counts == expected.counts
    order = [halved.groups.index(g) for g in expected.groups]
    torch.testing.assert_close(
        rows(halved)[order], rows(expected), rtol=1e-4, atol=1e-6 * float(rows(expected).abs().max())
    )
    assert "out of memory at" in capsys.readouterr().err
    assert sum(n * t > 150 for n, t in shapes) <= 2  # later batches are cut before they fail


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"structure": "kronecker", "space": "factor"}, (structures.Kronecker, "_add_right")),
        ({"structure": "lowrank", "structure_options": {"rank": 1}}, (torch.linalg, "eigh")),
        ({}, (structures.RowBuffer, "extend")),
    ],
    ids=["tokens of a module", "reducing a sketch", "room for rows"],
)
def test_a_batch_that_is_partly_in_is_never_added_again(options, place, session, data, monkeypatch):
    monkeypatch.setattr(*place, no_memory)
    with pytest.raises(MergeError, match="batch 0 failed halfway, and the Fisher may hold a part of it: go on from"):
        fisher_pass(session, data, **OPTIONS, **options)


def test_a_sequence_that_memory_does_not_hold_is_named(session, data, monkeypatch):
    def small_host(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(sst, "sequence_nll", small_host)
    with pytest.raises(MergeError, match=r"a single sequence of \d+ tokens \(line \d+ of .*data.jsonl\) does not fit"):
        fisher_pass(session, data, **OPTIONS)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"),
]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_two_ranks_save_what_one_process_saves(launcher, root, tmp_path):
    program = ["-m", "sst_merge.cli", "collect", "--exact", "--tokens-per-batch", "60", "--device", "cpu", "-q"]
    program += ["--model", root / "model", "--safety", root / "safety"]
    program += ["--harm-data", root / "data.jsonl", "--benign-data", root / "data.jsonl"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for start, name in (([sys.executable], "one"), (launcher, "two")):
        call = [*map(str, [*start, *program, "-o", tmp_path / name])]
        subprocess.run(call, check=True, env=environment, capture_output=True, timeout=300)
    one, two = (sst.Evidence.load(tmp_path / name).gain.rows["loss"] for name in ("one", "two"))
    assert one.counts == two.counts
    assert one.groups != two.groups  # each rank's part stands by itself
    order = [two.groups.index(g) for g in one.groups]
    torch.testing.assert_close(rows(two)[order], rows(one), rtol=1e-6, atol=0)
