"""Ten thousand accumulate steps leave memory and file descriptors where they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sst_kernels import fisher_accumulate, sequence_nll
from tests.models import tiny_batch, tiny_lora

STEPS, WARM = 10_000, 1_000


def held() -> tuple[int, int]:
    """Resident bytes and open file descriptors of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("space", ["core", "factor"])
def test_steps_do_not_grow_the_process(space, record_property):
    model, batch = tiny_lora(), tiny_batch(1)
    with fisher_accumulate(model, "safety", structure="diagonal", space=space) as pass_:
        for step in range(STEPS):
            sequence_nll(model, batch).backward()
            if step == WARM:
                before, files = held()
    after, files_after = held()
    record_property("grown_bytes", after - before)
    print(
        f"\n{space}: {STEPS} steps, resident memory grew by {(after - before) / 2**20:.2f} MiB after the first {WARM}"
    )
    assert pass_.fisher.counts.sequences == STEPS
    assert files_after == files
    # The groups of 9 000 samples are 72 kB of a list; one leaked [T, r] float32 tensor per module and step would be 30 MiB.
    assert after - before < 4 << 20
