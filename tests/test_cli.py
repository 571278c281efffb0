"""The command line: flags, recipes, plans, errors, and files, on the tiny model."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from rich.progress import Task
from safetensors.torch import load_file
from typer.testing import CliRunner

from sst_merge import cli, report
from sst_merge.errors import MergeError
from sst_merge.evaluate import Evaluation
from sst_merge.progress import Reporter
from tests import merge_cases as cases


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "task", seed=1, r=2)
    cases.adapter_folder(root / "safety", seed=2, target_modules=["q_proj", "o_proj"], scale=0.2)
    for name, n, word in (("harm", 8, "steal"), ("benign", 8, "bake")):
        cases.write_jsonl(root / f"{name}.jsonl", cases.pairs(n, word))
    return root


def call(*arguments):
    """Run a command; its MergeError is the result's, as for `cli.main`."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if isinstance(result.exception, MergeError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def inputs(world):
    return [
        *("--model", world / "model", "--safety", world / "safety", "--task", world / "task"),
        *("--harm-data", world / "harm.jsonl", "--benign-data", world / "benign.jsonl", "--device", "cpu", "-q"),
    ]


def test_merge_from_flags_and_force(world, tmp_path):
    command = ["merge", *inputs(world), "--output", tmp_path / "out", "--kl-budget", "0.05", "--label-draws", "1"]
    plan = call(*command, "--dry-run")
    assert "reading, benign" in plan
    assert list(tmp_path.iterdir()) == []
    assert f"written to {tmp_path / 'out'}" in call(*command)
    first = json.loads((tmp_path / "out/report.json").read_text())
    with pytest.raises(MergeError, match="--force"):
        call(*command)
    call(*command, "--force")
    second = json.loads((tmp_path / "out/report.json").read_text())
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}


def test_flags_win_over_the_recipe(world, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"model: {world}/model\nsafety: {world}/safety\nharm_data: {world}/harm.jsonl\n"
                      f"benign_data: {world}/benign.jsonl\noutput: out\nkl_budget: 0.1\nfilter: top_k\ndevice: cpu\n")  # fmt: skip
    call("merge", "--config", recipe, "--k", 2, "--limit", 6, "-q")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["patch"]["filter"], report["patch"]["parameter"]) == ("top_k", 2)
    assert report["recipe"]["kl_budget"] is None
    assert report["inputs"]["data"]["harm"]["sequences"] == 4  # of six, two to measure on


def test_collected_evidence_makes_what_a_merge_makes(world, tmp_path):
    """One reading, then other strengths, scopes and filters of it without model or data: the same bits as runs of their own."""
    path, own = tmp_path / "evidence.safetensors", tmp_path / "own"
    text = call("collect", *inputs(world), "--holdout", 0, "-o", path, "--label-draws", 2)
    assert re.search(r"harm: 8 sequences, \d+ tokens read, \d+ label tokens\nbenign: 16 sequences", text)
    assert [p.name for p in tmp_path.iterdir()] == ["evidence.safetensors"]
    call("merge", *inputs(world), "--holdout", 0, "-o", own, "--kl-budget", 0.05)
    adapters = ["--safety", world / "safety", "--task", world / "task", "-q"]
    for i, file in enumerate((path, own / "evidence.safetensors")):
        call("merge", *adapters, "--evidence", file, "-o", tmp_path / f"{i}", "--kl-budget", 0.05)
        assert (tmp_path / f"{i}" / "adapter_model.safetensors").read_bytes() == (
            own / "adapter_model.safetensors"
        ).read_bytes()
    given = ["--kl-budget", 0.01, "--scope", "module", "--input-filter", 1.0]
    call("merge", *adapters, "--evidence", path, "-o", tmp_path / "other", *given)
    call("merge", *inputs(world), "--holdout", 0, "-o", tmp_path / "anew", *given)
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("other", "anew"))
    assert one == two
    with pytest.raises(MergeError, match="another safety adapter"):
        call("merge", "--safety", world / "task", "-q", "--evidence", path, "-o", tmp_path / "x")
    with pytest.raises(MergeError, match="another task adapter"):
        call("merge", "--safety", world / "safety", "-q", "--evidence", path, "-o", tmp_path / "x")
    with pytest.raises(MergeError, match="unless evidence is given"):
        call("merge", *adapters, "-o", tmp_path / "x")
    with pytest.raises(MergeError, match="need a run of their own, without evidence"):
        call("merge", *adapters, "--evidence", path, "-o", tmp_path / "x", "--structure", "lowrank")
    with pytest.raises(MergeError, match=r"holds a 'fisher'|no file of sst_kernels|not a readable"):
        call("merge", *adapters, "--evidence", own / "adapter_model.safetensors", "-o", tmp_path / "x")


@pytest.mark.parametrize("command", ["merge", "collect"])
def test_quantization_reaches_the_model(world, tmp_path, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (tmp_path / "recipe.yml").write_text("quantization: {load_in_4bit: true}")
    with pytest.raises(MergeError, match="pip install bitsandbytes"):
        call(command, *inputs(world), "-c", tmp_path / "recipe.yml", "-o", tmp_path / "out")


def test_evaluate_prints_a_table_and_writes_prompts(world, tmp_path):
    out = tmp_path / "e.json"
    text = call(
        *("evaluate", "--model", world / "model", "--adapter", world / "safety", "--task", world / "task"),
        *("--harmful", world / "harm.jsonl", "--benign", world / "benign.jsonl", "--generate-tokens", 3),
        *("--output", out, "--device", "cpu", "-q"),
    )
    assert "refusal NLL" in text
    records = json.loads(out.read_text())
    assert records["reference"]["benign_kl"] == 0
    assert records[str(world / "safety")]["benign_kl"] > 0
    assert len(records["reference"]["prompts"]) == 16
    with pytest.raises(MergeError, match="nothing to measure on"):
        call("evaluate", "--model", world / "model")


def test_nothing_but_the_output_is_written(world, tmp_path, monkeypatch):
    """Not into the inputs, the working folder or the folder of temporary files; checkpoints are gone in the end."""
    for name in ("cwd", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    watched = [world, tmp_path / "cwd", tmp_path / "tmp"]

    def contents() -> dict:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for root in watched for path in root.rglob("*")}

    before = contents()
    call("merge", *inputs(world), "-o", tmp_path / "merged", "--label-draws", "1", "--checkpoint-every", "1")
    call("collect", *inputs(world), "-o", tmp_path / "evidence", "--checkpoint-every", "1")
    assert contents() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "evidence", "merged", "tmp"]


def test_env_reports(capsys):
    result = CliRunner().invoke(cli.app, ["env", "--json"])
    assert result.exit_code == 0
    assert isinstance(json.loads(result.stdout), dict)


@pytest.fixture
def handlers():
    numbers, hook = (signal.SIGTERM, signal.SIGHUP), sys.unraisablehook
    before = [signal.getsignal(number) for number in numbers]
    yield
    sys.unraisablehook = hook
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_errors_are_one_text_without_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["sst-merge", "merge", "--config", str(tmp_path / "no.yml")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"sst-merge: {tmp_path / 'no.yml'}: cannot be read (No such file or directory)\n"


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("no room\nat all"), RuntimeError("can't allocate memory: no room")]
)
def test_a_lack_of_memory_is_one_text_with_a_remedy(error, monkeypatch, capsys):
    def demo():
        raise error

    monkeypatch.setattr(cli, "app", demo)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert re.fullmatch(r"sst-merge: out of memory \(.*\w\); lower tokens_per_batch, .*\n", capsys.readouterr().err)


@pytest.mark.usefixtures("handlers")
def test_errors_of_torch_that_are_no_lack_of_memory_are_raised(monkeypatch):
    def demo():
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(cli, "app", demo)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        cli.main()


@pytest.mark.usefixtures("handlers")
def test_a_terminal_without_our_letters_shows_others(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(cli, "app", lambda: report.print_table({"µ": {"refusal_nll": 1.0}}))
    cli.main()
    terminal.flush()
    assert b"refusal NLL ?" in terminal.buffer.getvalue()


@pytest.mark.parametrize(
    "strike",
    [
        "os.kill(os.getpid(), signal.SIGTERM)",
        "os.kill(os.getpid(), signal.SIGHUP)",
        "Finalizer()",
        "signal.setitimer = early; Finalizer()",
    ],
)
def test_sigterm_removes_the_unfinished_output(tmp_path, strike):
    """Also where it strikes in a finalizer, which swallows what it raises, and where it comes back before that has ended."""
    script = (
        "import os, signal, sys, time, sst_merge.cli as cli, sst_merge.io.output as output\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # also where nohup runs the tests
        "class Finalizer:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        [None for _ in range(10)]\n"
        "timer = signal.setitimer\n"
        "def early(*_):\n"
        "    signal.setitimer = timer\n"
        "    os.kill(os.getpid(), signal.SIGALRM)\n"
        "    [None for _ in range(10)]\n"
        "def demo(*_, **__):\n"
        f"    with output.output_folder({str(tmp_path / 'out')!r}):\n"
        f"        {strike}\n"
        "        while True:\n"
        "            time.sleep(0.1)\n"
        "cli.app = demo\n"
        "cli.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, timeout=300)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stderr == b""
    assert list(tmp_path.iterdir()) == []


def test_table_shows_missing_numbers(capsys):
    report.print_table({"only benign": Evaluation(benign_kl=0.5, benign_nll=1.0).summary()})
    assert capsys.readouterr().out.splitlines()[1].split() == ["only", "benign", "–", "–", "0.5000", "1.000"]


def test_brackets_in_paths_and_prompts_stay(capsys):
    text = "[/][red]a[b] :smile:"
    reporter = Reporter()
    reporter.say(text)
    reporter.warn(text)
    assert list(reporter.track([1], text)) == [1]
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == [text, text]
    assert told[2].startswith(text)
    report.print_table({text: Evaluation(benign_kl=0.5, benign_nll=1.0).summary()})
    assert capsys.readouterr().out.splitlines()[1].startswith(text)


@pytest.mark.parametrize(
    ("elapsed", "rate"),
    [
        (60.0, "0.5"),
        (30 / 987, "987"),
        (30 / 9_999, "9,999"),
        (30 / 138_786, "139k"),
        (30 / 999_700, "1,000k"),
        (30 / 3e9, "3G"),
        (0.0, "–"),
    ],
)
def test_bars_show_rate_and_time_left_in_eighty_columns(capsys, monkeypatch, elapsed, rate):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Task, "elapsed", property(lambda _: elapsed))
    longest = "plain addition: greedy answers"
    assert list(Reporter().track([10, 20], longest, size=lambda n: n, unit="prompts")) == [10, 20]
    assert re.fullmatch(rf"{longest} ━+ 100% +{rate} prompts/s 0:0[01]:00 left 0:00:00\s*", capsys.readouterr().err)
    assert list(Reporter(quiet=True).track([1], longest)) == [1]
    assert capsys.readouterr().err == ""


def test_the_weight_of_first_words_is_chosen_afterwards_where_they_were_kept_apart(world, tmp_path):
    common = [*inputs(world), "--holdout", 0, "--kl-budget", 0.05]
    adapters = [
        "--safety",
        world / "safety",
        "--task",
        world / "task",
        "-q",
        "--kl-budget",
        0.05,
        "--opening-weight",
        6,
    ]
    call("collect", *inputs(world), "--holdout", 0, "--opening-apart", "-o", tmp_path / "apart")
    call("collect", *inputs(world), "--holdout", 0, "-o", tmp_path / "weighted")
    call("merge", *common, "--opening-weight", 6, "-o", tmp_path / "anew")
    call("merge", *adapters, "--evidence", tmp_path / "apart", "-o", tmp_path / "afterwards")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("anew", "afterwards"))
    for name, tensor in one.items():
        assert float((tensor - two[name]).norm()) <= 1e-4 * float(tensor.norm()), name
    with pytest.raises(MergeError, match=r"opening_weight: 6 is asked for, .* count 3\.0; take that, or collect again"):
        call("merge", *adapters, "--evidence", tmp_path / "weighted", "-o", tmp_path / "no")
