"""The instrument itself: its clock, its tables, its gates, its baselines, and what a Fisher pass adds to a step in calls."""

import csv
import json
import math
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch

import sst_kernels as sst
from bench import baselines, capture, common, evidence, gates, llm, ops, passes, report, results, workload
from bench.shapes import SHAPES, Shape
from sst_kernels.fisher import passes as fisher_passes
from sst_kernels.testing import error_ratio

TINY = Shape("tiny", "llama", 32, 48, 2, 4, 2, 61)


def tasks(seed=0, p=24, q=20, r=3, batch=()):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*batch, *size, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(p, r), draw(r, q)) for _ in range(2)]


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "billions", "modules"),
        [
            ("llama-2-7b", 6.607, 224),
            ("llama-3.1-8b", 7.505, 224),
            ("qwen2.5-7b", 7.070, 196),
            ("llama-2-13b", 12.852, 280),
        ],
    )
    def test_published_sizes(self, name, billions, modules):
        shape = SHAPES[name]
        assert shape.weights / 1e9 == pytest.approx(billions, abs=2e-3)
        assert len(shape.modules()) == modules
        assert len(shape.modules("attention")) == modules * 4 // 7

    def test_modules_are_those_of_the_model(self):
        model = workload.build_model(TINY, rank=2, length=8, device="cpu", dtype=torch.float32)
        found = {
            name.removeprefix("base_model.model."): tuple(layer.base_layer.weight.shape)
            for name, layer in model.named_modules()
            if hasattr(layer, "lora_A")
        }
        assert found == TINY.modules()

    def test_step_flops_match_what_torch_counts(self):
        from torch.utils.flop_counter import FlopCounterMode

        shape, batch, length = Shape("flops", "llama", 64, 96, 2, 4, 4, 128), 2, 32
        model = workload.build_model(shape, rank=4, length=length, device="cpu", dtype=torch.float32, attention="eager")
        step = passes.Pass(model, workload.token_batch(shape, batch, length, "cpu"))
        with FlopCounterMode(display=False) as counter:
            step()
        square = 6 * batch * length**2 * shape.hidden * shape.layers  # eager attention computes the masked half too
        first = 2 * batch * length * 3 * (64 * 64 + 4 * 64)  # q, k, v of the first layer: their input needs no gradient
        assert counter.get_total_flops() == shape.step_flops(batch, length, 4) + square - first


class TestClock:
    def test_one_thread_is_timed_by_its_own_work(self):
        import time

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            slept = common.measure(lambda: time.sleep(0.05), "cpu", repeats=2)
        finally:
            torch.set_num_threads(threads)
        assert slept.median < 25

    def test_a_budget_stops_early_but_never_before_one_run(self):
        assert len(common.measure(lambda: None, "cpu", repeats=9, seconds=0.0).times) == 1

    def test_median_and_quartiles(self):
        columns = common.Measured([4.0, 1.0, 2.0, 3.0, 5.0]).columns()
        assert (columns["ms"], columns["iqr_ms"], columns["runs"]) == (3.0, 2.0, 5)


class TestTables:
    def test_rows_are_on_disk_at_once_and_carry_the_machine(self, tmp_path):
        path = tmp_path / "rows.csv"
        record = common.Recorder(path, "cpu", model="m")
        record("pass", "plain", common.Measured([1.0, 3.0]), note='with, commas and "quotes"')
        common.Recorder(path, "cpu", model="n")("pass", "other", ms=2.0)
        with path.open(newline="") as file:
            first, second = csv.DictReader(file)
        assert (first["ms"], first["model"], first["note"]) == ("2", "m", 'with, commas and "quotes"')
        assert second["model"] == "n"
        assert all(first[key] for key in ("device", "versions", "commit", "date"))

    def test_an_unknown_column_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="speed"):
            common.Recorder(tmp_path / "rows.csv", "cpu")("pass", "plain", speed=1)

    def test_commit_of_a_tree_without_git_is_given(self, monkeypatch):
        monkeypatch.setenv("SST_COMMIT", "abc123")
        assert common.commit.__wrapped__() == "abc123"

    def test_ncu_log_becomes_one_row_per_kernel(self, tmp_path):
        log = tmp_path / "ncu_raw_ops.csv"
        log.write_text(
            "==PROF== Connected\n"
            '"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed"\n'
            '"","","ns","%"\n'
            '"0","void gram<float>(int)","2,000","50"\n"1","gram(int)","4,000","70"\n"2","sketch_kernel","1,000","80"\n'
        )
        capture.write_table([log], tmp_path / "ncu.csv")
        with (tmp_path / "ncu.csv").open(newline="") as file:
            gram, sketch = csv.DictReader(file)
        assert (gram["kernel"], gram["launches"], gram["time_us"], gram["dram_percent"]) == ("gram", "2", "3", "60")
        assert (sketch["stage"], sketch["time_us"]) == ("ops", "1")


class TestBaselines:
    def test_gate(self):
        assert gates.baseline_gate("cpu") < 1e-12

    @pytest.mark.parametrize("scope", ["global", "module"])
    def test_gate_of_the_solve(self, scope, monkeypatch):
        adapter = workload.random_adapter(TINY, 2, "all-linear", device="cpu")
        fishers = [workload.core_fisher(adapter, 8, device="cpu", seed=seed) for seed in (1, 2)]
        assert gates.solve_gate(*fishers, scope) < 1e-11
        solve = sst.subspace
        monkeypatch.setattr(sst, "subspace", lambda gain, cost, **options: solve(cost, gain, **options))
        with pytest.raises(AssertionError, match="not stationary"):
            gates.solve_gate(*fishers, scope)

    def test_dense_tsv_of_a_single_task_is_its_own_best_approximation(self):
        B, A = tasks(r=20)[0]
        assert error_ratio(baselines.tsv_dense([(B, A)]) @ torch.eye(20, dtype=B.dtype), _polar_scaled(B @ A)) < 1e-10

    def test_boosting_keeps_singular_vectors_and_raises_the_small_values(self):
        pairs = tasks()
        total = sum(B @ A for B, A in pairs)
        left, right = baselines.boosting_factors(pairs, energy=0.5)
        before, after = (torch.linalg.svdvals(x)[:6] for x in (total, left @ right))
        kept = int((before.cumsum(0) / before.sum() < 0.5).sum())
        torch.testing.assert_close(after[: kept + 1], before[: kept + 1])
        torch.testing.assert_close(after[kept:], before[kept].expand(6 - kept))

    @pytest.mark.parametrize("name", list(baselines.FACTORED))
    def test_stacked_modules_give_each_module_its_own(self, name):
        stacked = tasks(batch=(3,))
        left, right = baselines.FACTORED[name](stacked)
        for i in range(3):
            one_left, one_right = baselines.FACTORED[name]([(B[i], A[i]) for B, A in stacked])
            torch.testing.assert_close(left[i] @ right[i], one_left @ one_right)

    def test_dare_keeps_the_expectation(self):
        torch.manual_seed(0)
        pairs = tasks(p=8, q=8)
        mean = sum(baselines.dare_dense(pairs, 0.5) for _ in range(4000)) / 4000
        assert error_ratio(mean, sum(B @ A for B, A in pairs)) < 0.1


def _polar_scaled(x):
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u * s) @ vh


class TestCallsOfAPass:
    """Host cost, counted instead of timed: what the core Fisher adds to a training step."""

    def setup_method(self):
        self.model = workload.build_model(TINY, rank=2, length=16, device="cpu", dtype=torch.float32)
        self.step = passes.Pass(self.model, workload.token_batch(TINY, 2, 16, "cpu"))

    def test_one_launch_for_all_modules_and_few_operations_per_module(self, monkeypatch):
        calls, run = [], fisher_passes.core_outer
        monkeypatch.setattr(fisher_passes, "core_outer", lambda *given: calls.append(len(given[0])) or run(*given))
        modules = len(TINY.modules())
        plain, _ = common.count_calls(self.step, "cpu")
        with sst.fisher_accumulate(self.model, "safety"):
            events = common.profiled(self.step)
        assert calls == [modules]
        added = sum(event.cpu_parent is None for event in events) - plain
        assert added <= 10 * modules + 60, f"{added} operations more than the plain step, {modules} modules"

    @pytest.mark.gpu
    def test_launches_and_waits_on_a_gpu(self):
        model = workload.build_model(TINY, rank=4, length=16, device="cuda", dtype=torch.bfloat16)
        step = passes.Pass(model, workload.token_batch(TINY, 2, 16, "cuda"))
        step()
        plain = common.count_calls(step, "cuda")
        with sst.fisher_accumulate(model, "safety"):
            step()
            hooked = common.count_calls(step, "cuda")
        assert plain[0] > 0
        assert hooked[0] - plain[0] <= 3 * len(TINY.modules()) + 40
        assert hooked[1] - plain[1] <= 6


class TestInputPass:
    def test_gate(self):
        assert gates.evidence_gate("cpu") < 1e-5

    @pytest.mark.parametrize("columns", [None, 4])
    @pytest.mark.parametrize("targets", ["all-linear", "attention"])
    def test_arithmetic_of_the_state_is_that_of_the_pass(self, columns, targets):
        where = {"rank": 2, "targets": targets, "length": 16, "device": "cpu", "dtype": torch.float32}
        model = workload.build_model(TINY, **where)
        with torch.no_grad(), sst.input_moments(model, "safety", rank=columns) as moments:
            model(**workload.token_batch(TINY, 2, 16, "cpu"))
        assert moments.nbytes == TINY.input_bytes(columns, targets)

    def test_contestants_take_turns_inside_their_contexts(self):
        said = []

        @contextmanager
        def around(name):
            said.append(f"enter {name}")
            yield
            said.append(f"leave {name}")

        turns = {name: (partial(said.append, name), partial(around, name)) for name in "ab"}
        timed = common.in_turn(turns, "cpu", 2)
        turns = [tuple(said[i : i + 3]) for i in range(0, len(said), 3)]
        assert all(turn == (f"enter {turn[1]}", turn[1], f"leave {turn[1]}") for turn in turns)
        assert [sorted(name for _, name, _ in turns[i : i + 2]) for i in (0, 2, 4)] == [["a", "b"]] * 3
        assert [len(measured.times) for measured in timed.values()] == [2, 2]

    def test_a_pass_stands_beside_the_plain_step_of_its_round(self):
        said = []
        rows = passes.beside(partial(said.append, "plain"), {"other": partial(said.append, "other")}, "cpu", 2)
        assert [sorted(said[i : i + 2]) for i in range(0, len(said), 2)] == [["other", "plain"]] * 4
        plain, other = rows[""], rows["other"]
        assert other["plain_ms"] == plain["ms"]
        assert other["above_plain_mib"] == other["peak_mib"] - plain["peak_mib"]
        assert (other["runs"], "ratio" in plain) == (2, False)

    def test_a_ratio_is_the_median_over_rounds(self):
        assert common.Measured([4.0, 9.0, 5.0]).over(common.Measured([2.0, 3.0, 1.0])) == 3.0

    def test_the_whole_is_the_sum_of_its_parts(self, tmp_path):
        record = common.Recorder(tmp_path / "llm.csv", "cpu", model="m")
        llm.record_whole(record, "global", 3, 100.0, 7.0, 10.0, rank=16)
        assert (record.rows[0]["variant"], float(record.rows[0]["ms"])) == ("SST-Merge global", 3 * 100 + 7 + 10)


class TestEvidence:
    def test_every_reading_stands_beside_both_plain_steps(self, tmp_path):
        record = common.Recorder(tmp_path / "llm.csv", "cpu", model="tiny")
        model = workload.build_model(TINY, rank=2, length=16, device="cpu", dtype=torch.float32)
        sides = {
            side: workload.token_batch(TINY, 2, 16, "cpu", seed=seed) for seed, side in enumerate(("harm", "benign"))
        }
        found = evidence.readings(model, sides, record, "cpu", 1)
        names = [f"plain{how}, {side}" for side in sides for how in ("", ", logits at labels")]
        assert found.keys() == {*names, *report.READINGS}
        assert [
            float(r["ratio"])
            for r in record.rows
            if r["variant"].startswith("plain, ") and "logits" not in r["variant"]
        ] == [1, 1]

    def test_what_is_timed_is_a_reading_of_the_batch(self):
        model = workload.build_model(TINY, rank=2, length=16, device="cpu", dtype=torch.float32)
        batch = workload.token_batch(TINY, 3, 16, "cpu")
        turns = evidence.harmful(model, batch) | evidence.benign(model, batch)
        rows = {}
        for name, (run, opened) in turns.items():
            if isinstance(run, evidence.Reading):
                with opened():
                    run()
                    rows[name] = {loss: len(fisher.rows()) for loss, fisher in run.reading._side.rows.items()}
        assert rows == {
            "evidence, harm, one loss": {"loss": 3},
            "evidence, harm, opening and rest": {"opening": 3, "rest": 3},
            "evidence, benign, 2 draws": {"loss": 6},
        }

    def test_every_decision_is_a_row(self, tmp_path, monkeypatch):
        monkeypatch.setattr(evidence, "ROWS", {"gain": 16, "cost": 32})
        record = common.Recorder(tmp_path / "llm.csv", "cpu", model="tiny")
        at = passes.Setting(TINY, 2, "all-linear", 2, 16, "cpu", torch.float32, 1)
        evidence.decisions(at, record)
        assert evidence.layers_filter(at, record, 8) == pytest.approx(float(record.rows[-1]["ms"]), rel=1e-5)
        assert len(record.rows) == 10
        assert all(float(r["ms"]) > 0 for r in record.rows)


class TestOpCases:
    @pytest.mark.parametrize("op", ops.CASES)
    def test_both_forms_are_right(self, op):
        size = ops.Size(B=2, T=9, r=4, d=20, modules=3)
        for case in ops.CASES[op](ops.Draw(size, "cpu", torch.float32)):
            expected = [s.double() for s in case.state]
            case.plain(*(x.double() for x in case.inputs), *expected)
            assert all(e.any() for e in expected)
            for call in (case.call, case.plain):
                assert ops.error_of(case, call, expected) <= ops.ALLOWED
            wrong = [e + 1e-3 * e.norm() for e in expected]
            assert ops.error_of(case, case.call, wrong) > ops.ALLOWED

    def test_rows_carry_the_floor_and_the_torch_form(self, tmp_path):
        out = tmp_path / "ops_cpu.csv"
        assert ops.main(["--quick", "--no-compile", "--ops", "sketch", "--out", str(out)]) == 0
        rows = [r for r in results.Results(tmp_path).rows if r["stage"] == "sketch"]
        assert [r["variant"] for r in rows] == ["sst", "torch"]
        assert all(float(r["floor_ms"]) > 0 and float(r["error"]) <= ops.ALLOWED for r in rows)
        assert float(rows[1]["ratio"]) == 1.0


class TestArithmetic:
    def test_state_of_7b(self):
        assert SHAPES["llama-2-7b"].row_bytes(16, 1) == 2 * 4 * 57344
        assert SHAPES["llama-2-7b"].kfac_bytes() / 2**30 == pytest.approx(65.4, abs=0.1)

    def test_moments_of_inputs_of_7b(self):
        shape = SHAPES["llama-2-7b"]
        widths = 32 * (3 * 4096 + 11008)
        assert shape.input_bytes(512) == 4 * 512 * (widths + 128 * 512)  # Y = X Ω above its core Ωᵀ X Ω
        assert shape.input_flops(512) == 4 * 512 * widths
        assert shape.input_bytes(None) == 4 * shape.input_flops(None)
        assert shape.input_flops(None) == 32 * (3 * 4096**2 + 11008**2)
        assert 1 < shape.reading_share(512) < shape.reading_share(None) < 1.3
        assert shape.reading_share(512, 2) - shape.reading_share(512) == pytest.approx(0.5, abs=0.01)


def test_stages_are_named_for_the_profiler():
    adapter = workload.random_adapter(TINY, 2, "all-linear", device="cpu")
    gain, cost = (workload.core_fisher(adapter, 8, device="cpu", seed=seed) for seed in (1, 2))
    pencil = torch.eye(8, dtype=torch.float64), 2 * torch.eye(8, dtype=torch.float64)
    events = common.profiled(lambda: (sst.subspace(gain, cost).soft(mu=1.0), sst.gevp(*pencil, 2)))
    assert {"sst.subspace", "sst.gevp", "sst.filter"} <= {event.name for event in events}


@pytest.mark.slow
def test_every_stage_of_the_llm_bench_runs(tmp_path):
    out = tmp_path / "llm.csv"
    assert llm.main(["--scale", "tiny", "--batch", "2", "--length", "16", "--samples", "8", "--repeats", "1", "--out", str(out)]) == 0  # fmt: skip
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {
        "gate",
        "ceiling",
        "pass",
        "evidence",
        "decision",
        "gevp",
        "filter",
        "export",
        "inputs",
        "merge",
        "end to end",
    } <= {r["stage"] for r in rows}
    assert all(math.isfinite(float(r["ms"])) for r in rows if r["ms"])


@pytest.mark.slow
def test_a_profile_without_a_gpu_is_a_chrome_trace(tmp_path):
    command = [sys.executable, "-m", "bench.capture", "gevp", "--small", "--out", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=common.ROOT).stdout
    assert "nsys profile --capture-range=cudaProfilerApi" in shown
    assert "ncu --clock-control none --profile-from-start off" in shown
    assert json.loads((tmp_path / "trace_gevp.json").read_text())["traceEvents"]
