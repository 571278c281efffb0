"""The rows of a comparison as CSV, without prompts: its figures and intervals, and the share refused for each origin.

python studies/quality/table.py quality-output/compare --csv studies/quality/results/compare.csv
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

NUMBERS = (
    "refusal_rate",
    "judge_refused",
    "classifier_refused",
    "over_refusal",
    "judge_over_refusal",
    "task_accuracy",
    "refusal_nll",
    "benign_kl",
    "first_token_kl",
    "benign_nll",
    "merge_seconds",
    "evaluation_seconds",
)
SPANS = ("refusal_nll", "kl", "ratio", "rate_ratio")


def table(folder: Path) -> list[dict[str, Any]]:
    """One line per row of OUTPUT/report.json, in its order. SystemExit where one strength was measured under two recipes."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    context = report["context"]
    harm = Path(context["recipe"]["eval_harm_data"]).read_text(encoding="utf-8").splitlines()
    origin = {number: json.loads(line)["source"] for number, line in enumerate(harm, 1)}
    measured: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for file in sorted((folder / "rows").glob("*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))["row"]
        measured[row["method"], row["strength"]].append(row)
    out = []
    for row in report["rows"]:
        found = measured[row["method"], row["strength"]]
        if len(found) > 1:
            raise SystemExit(
                f"{folder}: {row['method']} {row['strength']:g} is there twice; give each recipe its output"
            )
        line = {"method": row["method"], "strength": row["strength"], **{name: row.get(name) for name in NUMBERS}}
        line |= {f"robust_refused {name}": share for name, share in row.get("robust_refused", {}).items()}
        for name in SPANS:
            value, low, high = row["intervals"].get(name, (None,) * 3)
            line |= ({name: value} if "ratio" in name else {}) | {f"{name}_lo": low, f"{name}_hi": high}
        line |= {f"refused {source}": share for source, share in by_origin(found[0]["prompts"], origin).items()}
        when = datetime.date.fromtimestamp((folder / "report.json").stat().st_mtime).isoformat()
        out.append(line | {"versions": json.dumps(context["versions"]), "date": when})
    return out


def by_origin(prompts: list[dict[str, Any]], origin: dict[int, str]) -> dict[str, float]:
    """The share refused of the harmful prompts of each source."""
    said = defaultdict(list)
    for prompt in prompts:
        if prompt["set"] == "harmful":
            said[origin[prompt["line"]]].append(prompt["refused"])
    return {source: sum(answers) / len(answers) for source, answers in sorted(said.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="output folder of `sst-merge compare`")
    parser.add_argument("--csv", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    rows = table(args.comparison)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with open(args.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
