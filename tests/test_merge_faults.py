"""`sst-merge merge --checkpoint-every 1 --resume` killed, terminated or out of disk at random points: the same bytes."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests import merge_faults as faults


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The inputs, what an undisturbed run writes, and its seconds."""
    folder = faults.inputs(tmp_path_factory.mktemp("merge"))
    faults.run(folder, folder / "warm-up")  # starts the fork server
    start = time.monotonic()
    code, text = faults.run(folder, folder / "expected")
    assert code == 0, text
    return folder, faults.contents(folder / "expected"), time.monotonic() - start


def scenario(undisturbed, place: Path, seed: int) -> list[tuple[str, float, int]]:
    folder, expected, seconds = undisturbed
    draw, output, happened = random.Random(seed), place / "out", []
    for i in range(draw.randint(1, 3)):
        kind, point = faults.KINDS[(seed + i) % 3], draw.random()
        code, text = faults.run(folder, output, kind, point, seconds)
        happened.append((kind, round(point, 2), code))
        assert "Traceback" not in text, (happened, text)
        if output.exists():  # it was complete before its fault came, which may have come before the end
            break
        assert code != 0, happened
        if kind == "disk full":
            assert code == 2, happened
            assert "could not be written" in text
    if not output.exists():
        code, text = faults.run(folder, output)
        assert code == 0, (happened, text)
    assert faults.contents(output) == expected, happened
    assert code != 0 or not (place / ".out-checkpoints").exists()
    return happened


@pytest.mark.parametrize("seed", range(3))
def test_a_merge_goes_on_to_the_same_bytes(seed, undisturbed, tmp_path):
    scenario(undisturbed, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_many_random_faults(seed, undisturbed, tmp_path):
    happened = scenario(undisturbed, tmp_path, seed)
    if tally := os.environ.get("FAULT_TALLY"):
        with open(tally, "a") as file:
            file.write("".join(f"{kind} {code}\n" for kind, _, code in happened))
