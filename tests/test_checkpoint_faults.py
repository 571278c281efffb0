"""Kill a real pass anywhere, resume it, and compare the result with that of an undisturbed pass, bit for bit."""

from __future__ import annotations

import time

import pytest

from tests.faults import CASES, KINDS, inject, scenario


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of every case's file, from a pass that nothing disturbs, in a child as the others: with as many threads."""
    results = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        assert inject(folder, case, "none", 0.0, 0.0) == 0
        assert [p.name for p in folder.iterdir()] == ["result.safetensors"]
        results[case] = (folder / "result.safetensors").read_bytes()
    return results


@pytest.fixture(scope="module")
def seconds(tmp_path_factory) -> float:
    """How long a child takes, the fork server being warm: kills are spread over this."""
    for attempt in ("first", "timed"):
        start = time.monotonic()
        assert inject(tmp_path_factory.mktemp(attempt), "full", "none", 0.0, 0.0) == 0
    return time.monotonic() - start


def check(folder, seed, seconds, expected):
    case, faults = scenario(folder, seed, seconds)
    assert (folder / "result.safetensors").read_bytes() == expected[case], (seed, case, faults)
    assert [p.name for p in folder.iterdir()] == ["result.safetensors"]
    return faults


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_resumed_passes_have_the_bits_of_undisturbed_ones(seed, tmp_path, seconds, expected):
    check(tmp_path, seed, seconds, expected)


@pytest.mark.slow
def test_fifty_kill_points(tmp_path, seconds, expected, record_property):
    injected = []
    for seed in range(100, 150):
        folder = tmp_path / str(seed)
        folder.mkdir()
        injected += check(folder, seed, seconds, expected)
    record_property("faults", len(injected))
    died = [code for _, _, code in injected if code != 0]
    print(f"\n{len(injected)} faults in 50 passes, {len(died)} ended the process, 50 results equal bit for bit")
    assert len(died) >= 25
