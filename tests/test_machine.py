"""The model of the machine: its table, its page, and what `bench.ops` says of it."""

from __future__ import annotations

import pytest
import torch

from bench import machine
from bench.ops import CASES, Draw, Size, sizes

LAUNCHES = {
    "core_outer": 1,
    "factor_rows": 1,
    "factor_moments": 1,
    "sketch": 3,
}  # weights of tokens, projection, and back


@pytest.mark.parametrize("op", LAUNCHES)
def test_launches_are_those_of_the_launcher(op):
    for case in CASES[op](Draw(Size(2, 48, 4, 32, 3), "cpu", torch.bfloat16)):
        before = [s.clone() for s in case.state]
        assert len(machine.launched(case)) == LAUNCHES[op]
        assert all(map(torch.equal, before, case.state))  # no kernel ran


def test_a_gram_matrix_of_few_tiles_adds_its_parts():
    case = next(CASES["gram"](Draw(Size(2, 4096, 4, 32, 3), "cpu", torch.bfloat16)))
    assert [kernel.fn.__name__ for kernel, *_ in machine.launched(case)] == ["gram_kernel", "add_partials_kernel"]


def test_the_page_is_that_of_the_table():
    assert machine.PAGE.read_text() == machine.page(machine._table())


def test_every_quick_size_has_a_prediction():
    for op in CASES:
        for size in sizes(op, "cuda", 224, True):
            found = {
                r["op"]
                for r in machine._table()
                if (r["batch"], r["length"], r["rank"]) == (str(size.B), str(size.T), str(size.r))
            }
            assert any(name.split(" ")[0] == op for name in found), (op, size)
    row = machine._table()[0]
    said = machine.prediction(row["op"], row["width"], int(row["batch"]), int(row["length"]), int(row["rank"]))
    assert said == f"predicted {1e3 * float(row['predicted_ms']):.1f} us on an H100"
    assert machine.prediction("gram", "d=5", 1, 1, 1) == ""


def test_a_multiprocessor_holds_what_its_scarcest_resource_allows():
    assert machine.resident(registers=57, shared=12288, warps=1) == 17  # shared memory: 13 KiB each of 228
    assert machine.resident(registers=230, shared=1024, warps=4) == 2  # 232 registers of 128 threads
    assert machine.resident(registers=32, shared=0, warps=1) == 32  # the limit of CTAs
    assert machine.predicted_ms(1.0, ctas=198, launches=2) == pytest.approx(2 / 1.5 + 0.005)
    assert machine.predicted_ms(1.0, ctas=264, launches=1) == pytest.approx(1.0025)
