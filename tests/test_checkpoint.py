"""Checkpoints of a pass: the same bits after resuming, and every way in which a file or a disk can fail."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from sst_kernels import Fisher, fisher_accumulate, sequence_nll
from sst_kernels.fisher import Checkpoints, Interrupted, StorageError, item_seed, storage
from tests.models import tiny_batch, tiny_lora

BATCHES = [tiny_batch(2, seed=i) for i in range(6)]


def start(path: Path | None = None, **options):
    return fisher_accumulate(tiny_lora(), "safety", resume=path, **options)


def feed(pass_, batches=BATCHES) -> None:
    for batch in batches:
        sequence_nll(pass_.model, batch).backward()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "pass.checkpoint"
    with start() as pass_:
        feed(pass_, BATCHES[:3])
        pass_.save_checkpoint(path, {"items": 3, "note": "half"})
    return path


def same_bits(a: Fisher, b: Fisher) -> bool:
    (header, tensors), (other_header, other) = a.pack(), b.pack()
    return header == other_header and all(torch.equal(t, other[k]) for k, t in tensors.items())


def test_progress_comes_back_and_the_rest_gives_the_same_bits(checkpoint):
    with start() as whole:
        feed(whole)
    with start(checkpoint) as resumed:
        assert resumed.progress == {"items": 3, "note": "half"}
        feed(resumed, BATCHES[3:])
    assert same_bits(resumed.fisher, whole.fisher)


def test_a_complete_checkpoint_needs_no_more_batches(checkpoint):
    with start(checkpoint) as resumed:
        pass
    assert resumed.fisher.counts.sequences == 6


def test_skipped_samples_keep_their_batch_numbers(tmp_path):
    path, batch = tmp_path / "c", BATCHES[0]
    with start(nonfinite="skip") as pass_:
        feed(pass_, BATCHES[:1])
        pass_.save_checkpoint(path)
    model = tiny_lora()
    norm = model.base_model.model.model.norm
    with fisher_accumulate(model, "safety", nonfinite="skip", resume=path) as resumed:
        norm.register_forward_hook(
            lambda _m, _i, y: y.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), float("inf"))) and None
        )
        sequence_nll(model, batch).backward()
    assert resumed.skipped == [(1, 1)]
    assert resumed.fisher.counts.sequences == 3


@pytest.mark.parametrize("settings", [{"every": 0}, {"every": 1.5}, {"seconds": -1.0}, {"seconds": float("nan")}])
def test_intervals_that_never_end_are_refused(settings, tmp_path):
    with start() as pass_, pytest.raises(ValueError, match=r"(every|seconds): expected"):
        feed(pass_)
        Checkpoints(pass_, tmp_path / "pass.checkpoint", **settings)


def test_places_that_hold_no_file(tmp_path):
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        Fisher.load(tmp_path)
    with start() as pass_:
        feed(pass_)
    for path in (tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(StorageError, match="could not be written"):
            pass_.save(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "differing"),
    [
        ({"point": "reference"}, "point"),
        ({"structure": "lowrank"}, "structure"),
        ({"scope": "module"}, "scope"),
        ({"sample": "token", "scope": "module"}, "sample"),
        ({"space": "factor", "structure": "kronecker"}, "space"),
        ({"modules": ".*q_proj"}, "fingerprint, blocks"),
    ],
)
def test_checkpoints_of_other_passes_are_refused(checkpoint, options, differing):
    with pytest.raises(
        ValueError, match=rf"checkpoint: the saved state is of another pass: .*{differing.split(',')[0]}"
    ):
        start(checkpoint, **options)


def test_checkpoints_of_other_adapters_are_refused(checkpoint):
    with pytest.raises(ValueError, match="fingerprint differ"):
        fisher_accumulate(tiny_lora(seed=3), "safety", resume=checkpoint)


def test_fishers_and_checkpoints_are_told_apart(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="holds a 'checkpoint', expected a Fisher"):
        Fisher.load(checkpoint)
    with start() as pass_:
        feed(pass_)
    pass_.save(tmp_path / "fisher")
    with pytest.raises(ValueError, match="holds a 'fisher', expected a checkpoint"):
        start(tmp_path / "fisher")


def test_a_missing_checkpoint_is_no_fresh_start(tmp_path):
    with pytest.raises(FileNotFoundError):
        start(tmp_path / "none")


def test_checkpoints_are_taken_between_batches(tmp_path):
    with start() as pass_:
        feed(pass_, BATCHES[:1])
        loss = sequence_nll(pass_.model, BATCHES[1])
        with pytest.raises(RuntimeError, match="between batches"):
            pass_.save_checkpoint(tmp_path / "c")
        loss.backward()


def test_checkpoints_of_other_data_are_refused(tmp_path):
    with start() as pass_, Checkpoints(pass_, tmp_path / "c", every=1, identity="data a, seed 0") as keep:
        for batch in keep.remaining(BATCHES[:2]):
            feed(pass_, [batch])
    with (
        start(tmp_path / "c") as pass_,
        pytest.raises(ValueError, match="'data a, seed 0', this pass has 'data b, seed 0'"),
    ):
        Checkpoints(pass_, tmp_path / "c", identity="data b, seed 0").__enter__()


def test_sigterm_checkpoints_and_exits_with_143(tmp_path):
    path, before = tmp_path / "c", signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="after 3 items") as stop, start() as pass_, Checkpoints(pass_, path) as keep:
        for i, batch in enumerate(keep.remaining(BATCHES)):
            feed(pass_, [batch])
            if i == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    with start(path) as resumed, Checkpoints(resumed, path) as keep:
        assert list(keep.remaining(range(6))) == [3, 4, 5]


def test_time_between_checkpoints(tmp_path):
    with start() as pass_, Checkpoints(pass_, tmp_path / "c", seconds=0.0) as keep:
        for batch in keep.remaining(BATCHES[:2]):
            feed(pass_, [batch])
    assert start(tmp_path / "c").progress["items"] == 0  # seconds=0 and every=None: only the first one
    with start() as pass_, Checkpoints(pass_, tmp_path / "d", seconds=1e-9) as keep:
        for batch in keep.remaining(BATCHES[:2]):
            feed(pass_, [batch])
    assert start(tmp_path / "d").progress["items"] == 2


def test_unfinished_files_of_killed_writers_are_removed(tmp_path):
    (tmp_path / f"{storage.partial_prefix(tmp_path / 'c')}0123").write_bytes(b"torn")
    (tmp_path / ".c.other").write_bytes(b"not ours")
    with start() as pass_, Checkpoints(pass_, tmp_path / "c"):
        feed(pass_, BATCHES[:1])
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.other", "c"]


def test_item_seeds_are_fixed_and_apart():
    assert item_seed(0, 0) == 48539274569083416
    assert len({item_seed(seed, i) for seed in range(20) for i in range(500)}) == 10_000


# Disks that fail.


@pytest.fixture
def tiny_disk(tmp_path) -> Path:
    """A 256 KiB file system; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_pass(tiny_disk):
    path = tiny_disk / "c"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with start() as pass_, Checkpoints(pass_, path, every=1) as keep:
            for i, batch in enumerate(keep.remaining(BATCHES)):
                if i == 3:
                    (tiny_disk / "ballast").write_bytes(
                        bytes(256 * 1024 - 4096 - sum(p.stat().st_size for p in [path]))
                    )
                feed(pass_, [batch])
    text = [str(w.message) for w in caught if "no checkpoint" in str(w.message)]
    assert len(text) == 3
    assert "no checkpoint after 4 items, the last good one holds 3" in text[0]
    assert "the previous one is intact" in text[0]
    assert pass_.fisher.counts.sequences == 12
    assert {p.name for p in tiny_disk.iterdir()} == {"c", "ballast"}
    with start(path) as resumed:
        feed(resumed, BATCHES[resumed.progress["items"] :])
    assert same_bits(resumed.fisher, pass_.fisher)
    with pytest.raises(StorageError, match=r"could not be written .*nothing was left there: free space"):
        pass_.save(tiny_disk / "fisher")


def test_a_folder_that_cannot_be_written_is_found_before_the_first_batch(tmp_path):
    with (
        pytest.raises(StorageError, match="could not be written"),
        start() as pass_,
        Checkpoints(pass_, tmp_path / "missing" / "c"),
    ):
        pytest.fail("the pass must not begin")


# Files that are damaged.


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 9, 100, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(checkpoint, keep):
    raw = checkpoint.read_bytes()
    checkpoint.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        start(checkpoint)


def test_every_flipped_bit_is_found(checkpoint):
    raw = checkpoint.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, 8 * len(raw), (200,), generator=generator).tolist():
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << position % 8
        checkpoint.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"readable safetensors|damaged|schema|checksum"):
            storage.read_tensors(checkpoint)


def malicious():
    def header(text: bytes, claim: int | None = None) -> bytes:
        return struct.pack("<Q", len(text) if claim is None else claim) + text

    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    yield "length beyond the file", header(b"{}", 1 << 62)
    yield "length of 2^64 - 1", header(b"{}", (1 << 64) - 1)
    yield "not json", header(b"\xff\xfe{}")
    yield "deep nesting", header(b"[" * 100_000)
    yield "offsets beyond the file", header(json.dumps({"x": {**tensor, "data_offsets": [0, 1 << 40]}}).encode())
    yield (
        "offsets that do not fit the shape",
        header(json.dumps({"x": {**tensor, "shape": [1 << 40]}}).encode()) + bytes(4),
    )
    yield "shape that overflows", header(json.dumps({"x": {**tensor, "shape": [1 << 62, 1 << 62]}}).encode()) + bytes(4)
    yield "negative offsets", header(json.dumps({"x": {**tensor, "data_offsets": [-4, 0]}}).encode()) + bytes(4)
    yield "a pickle", b"\x80\x04\x95cos\nsystem\n(S'true'\ntR."
    yield "no metadata", header(json.dumps({"x": tensor}).encode()) + bytes(4)
    metadata = {"__metadata__": {"sst_kernels": "0 " + "[" * 50_000}, "x": tensor}
    yield "metadata of nested lists", header(json.dumps(metadata).encode()) + bytes(4)


@pytest.mark.parametrize("raw", [pytest.param(raw, id=name) for name, raw in malicious()])
def test_malicious_headers_are_refused(raw, tmp_path):
    (tmp_path / "x").write_bytes(raw)
    for read in (Fisher.load, storage.read_tensors):
        with pytest.raises(ValueError, match=r"readable safetensors|damaged|schema"):
            read(tmp_path / "x")


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": []},
        {"blocks": [{"name": "x", "module": "x", "shape": [1 << 40, 1 << 40]}]},
        {"blocks": None},
        {"holders": {}},
        {"meta": {"structure": "os.system"}},
        {"meta": None},
        {"groups": None},
        {"joint": False},
        {
            "holders": {
                "joint": {"options": {"sample": "sequence", "count": "sequences", "rows": "keep", "x": 1}, "counts": {}}
            }
        },
    ],
)
def test_checksummed_nonsense_is_refused(change, tmp_path):
    """Whoever writes a file can also write its checksum, so the contents are checked too."""
    with start() as pass_:
        feed(pass_, BATCHES[:1])
    header, tensors = pass_.fisher.pack()
    storage.write_tensors(tmp_path / "x", tensors, {"kind": "fisher", **header, **change})
    with pytest.raises(ValueError, match=r"does not describe a Fisher|structure: expected|another pass|is damaged"):
        Fisher.load(tmp_path / "x")


def test_checksummed_tensors_of_other_shapes_are_refused(tmp_path):
    with start() as pass_:
        feed(pass_, BATCHES[:1])
    header, tensors = pass_.fisher.pack()
    for rows in (tensors["state/joint/rows"][:, :1], tensors["state/joint/rows"].double()):
        storage.write_tensors(tmp_path / "x", {**tensors, "state/joint/rows": rows}, {"kind": "fisher", **header})
        with pytest.raises(ValueError, match="has other tensors"):
            Fisher.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("left", "mine", "message"),
    [
        ("c.rank1of2", "c", "a pass over 2 processes, and this one runs in 1"),
        ("c", "c.rank0of2", "a pass over 1 process, and this one runs in 2"),
        ("c.rank3of4", "c.rank0of2", "a pass over 4 processes, and this one runs in 2"),
    ],
)
def test_checkpoints_of_another_number_of_processes_are_refused(left, mine, message, tmp_path):
    """Started anew beside them, or on shares that others took, a pass would count batches twice or never."""
    (tmp_path / left).touch()
    with start() as pass_:
        with pytest.raises(ValueError, match=message):
            Checkpoints(pass_, tmp_path / mine).__enter__()
        (tmp_path / left).rename(tmp_path / f"other-{left}")
        with Checkpoints(pass_, tmp_path / mine) as keep:
            for batch in keep.remaining(BATCHES[:2]):
                feed(pass_, [batch])
