"""What may have been measured of an adapter beside refusals and benign KL: its heading, and how it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .model import Cell, Column
from .words import Show, fixed, number, percent

# key: heading, writing, and whether it is left out where there is little room
MEASURES: dict[str, tuple[str, Show, bool]] = {
    "predicted_kl": ("predicted KL", number, True),
    "over_refusal": ("safe prompts refused", percent, False),
    "task_accuracy": ("task accuracy", percent, False),
    "judge_refused": ("refused, by log-odds", percent, True),
    "classifier_refused": ("refused, by a classifier", percent, True),
    "judge_over_refusal": ("safe refused, by log-odds", percent, True),
    "classifier_over_refusal": ("safe refused, by a classifier", percent, True),
    "first_token_kl": ("first-token KL", number, True),
    "refusal_nll": ("refusal NLL", fixed, True),
    "benign_nll": ("benign NLL", fixed, True),
    "merge_seconds": ("merge, s", number, True),
}
ROBUST = "robust_refused"  # a share for each way of putting the harmful prompts differently


class Measured:
    """The measures that any of these rows has, as columns and as cells of a row."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.keys = [key for key in MEASURES if any(row.get(key) is not None for row in rows)]
        self.wrappers = list(dict.fromkeys(name for row in rows for name in row.get(ROBUST) or {}))

    def columns(self) -> list[Column]:
        robust = [Column(f"refused, {name}", True) for name in self.wrappers]
        return [Column(MEASURES[key][0], MEASURES[key][2]) for key in self.keys] + robust

    def cells(self, row: Mapping[str, Any]) -> list[Cell]:
        values = [(row.get(key), MEASURES[key][1]) for key in self.keys]
        values += [((row.get(ROBUST) or {}).get(name), percent) for name in self.wrappers]
        return [Cell(show(value), value) for value, show in values]
