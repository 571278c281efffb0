"""What every prompt met under every adapter, for one page: as much of it as a page can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .model import Answers

ROWS, CHARACTERS = 400, 4000  # of a set, of a text; `prompts.json` and `rows/` have all
_ORDER = {"harmful": 0, "safe": 1, "benign": 2}


def answers(records: Mapping[str, Sequence[Mapping[str, Any]]], before: str, after: str) -> Answers:
    """Records of adapters, as `Evaluation.prompts` has them, by prompt: harmful, safe, then benign; the benign that moved most first.

    before, after: the two adapters that stand side by side at first.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for name, prompts in records.items():
        for p in prompts:
            row = rows.setdefault(
                (p["set"], p["line"]), {"set": p["set"], "line": p["line"], "prompt": _cut(p.get("prompt")), "of": {}}
            )
            found = {"answer": _cut(p.get("answer")), "refused": p.get("refused"), "kl": p.get("benign_kl")}
            row["of"][name] = {key: value for key, value in found.items() if value is not None}
    sets: dict[str, list[dict[str, Any]]] = {}
    for row in rows.values():
        sets.setdefault(row["set"], []).append(row)
    kept: list[dict[str, Any]] = []
    for name in sorted(sets, key=lambda s: _ORDER.get(s, len(_ORDER))):
        ranked = sorted(sets[name], key=_moved if name == "benign" else _line)
        kept += ranked[:ROWS]
    names = tuple(name for name, prompts in records.items() if prompts)
    left = sum(max(0, len(s) - ROWS) for s in sets.values())
    return Answers(names, before if before in names else "", after if after in names else "", tuple(kept), left)


def _line(row: Mapping[str, Any]) -> int:
    return row["line"]


def _moved(row: Mapping[str, Any]) -> float:
    return -max((of["kl"] for of in row["of"].values() if "kl" in of), default=0.0)


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= CHARACTERS:
        return text
    return f"{text[:CHARACTERS]} … ({len(text) - CHARACTERS} more characters)"
