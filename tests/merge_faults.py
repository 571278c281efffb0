"""`sst-merge merge` and `compare` in child processes that are killed, terminated or run out of disk: importable by a fork server."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from sst_merge import cli, report
from sst_merge.compare import report as compare_report
from tests import merge_cases as cases

KINDS = ("sigkill", "sigterm", "disk full")
RECIPE = {
    "model": "model", "safety": "safety", "task": "task", "harm_data": "harm.jsonl", "benign_data": "benign.jsonl",
    "output": "out", "label_draws": 2, "tokens_per_batch": 200, "kl_budget": 0.05, "device": "cpu",
}  # fmt: skip


def inputs(folder: Path) -> Path:
    """Model, adapters, data and recipe of a small merge."""
    cases.model_folder(folder / "model")
    cases.adapter_folder(folder / "task", seed=1, r=2)
    cases.adapter_folder(folder / "safety", seed=2, target_modules=["q_proj", "o_proj"], scale=0.2)
    for name, word in (("harm", "steal"), ("benign", "bake")):
        cases.write_jsonl(folder / f"{name}.jsonl", cases.pairs(8, word))
    (folder / "recipe.yml").write_text(json.dumps(RECIPE))
    return folder


def child(folder: str, output: str, limit: int | None, comparison: bool) -> None:
    """One run of the command, from what an earlier one left."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    log = open(f"{output}.log", "w")  # noqa: SIM115 (lives as long as the process)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    report.html = compare_report.html = lambda page: ""  # it takes longer than all the rest
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails with EFBIG instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    merge = ["merge", "-c", f"{folder}/recipe.yml", "--checkpoint-every", "1", "--resume"]
    sys.argv = ["sst-merge", *(["compare", f"{folder}/compare.yml"] if comparison else merge), "-o", output]
    cli.main()


def run(
    folder: Path,
    output: Path,
    kind: str = "none",
    point: float = 0.0,
    seconds: float = 0.0,
    *,
    comparison: bool = False,
) -> tuple[int, str]:
    """Exit code and printed text of a run with one fault; `seconds` is how long an undisturbed run takes."""
    limit = int(2000 + point * 20000) if kind == "disk full" else None
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.merge_faults"])
    process: Any = server.Process(target=child, args=(str(folder), str(output), limit, comparison))
    process.start()
    if kind in ("sigkill", "sigterm"):
        time.sleep(point * seconds)
        process.kill() if kind == "sigkill" else process.terminate()
    process.join(300)
    log = Path(f"{output}.log")
    text = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    return process.exitcode, text


def contents(output: Path) -> dict[str, Any]:
    """What two runs of one recipe must share: all files but the page; of the report all but the seconds and the commit."""
    report = json.loads((output / "report.json").read_text())
    report.pop("seconds")
    report["versions"].pop("commit")
    report["recipe"].pop("output")
    files = ("adapter_model.safetensors", "adapter_config.json")
    return {"report": report} | {name: (output / name).read_bytes() for name in files}
