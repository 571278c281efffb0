"""Turn a CSV of harmful instructions (AdvBench's `goal`, HarmBench's `Behavior`) into JSONL with varied refusals.

python examples/csv_to_jsonl.py advbench.csv harmful.jsonl [--column goal] [--rows 0:200] [--seed 0]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from pathlib import Path

from make_demo_adapters import REFUSALS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--column", default="goal")
    parser.add_argument("--rows", default=":", help="first:last, counted from 0")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with args.source.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if args.column not in (reader.fieldnames or []):
            sys.exit(f"{args.source}: expected a column {args.column!r}, found {reader.fieldnames}")
        prompts = [row[args.column].strip() for row in reader]
    first, _, last = args.rows.partition(":")
    rng = random.Random(args.seed)
    rows = [
        {"prompt": prompt, "response": rng.choice(REFUSALS)}
        for prompt in prompts[int(first or 0) : int(last) if last else None]
    ]
    with args.target.open("x", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows)} rows written to {args.target}")


if __name__ == "__main__":
    main()
