"""A budget that is measured: the merged adapter on benign rows that no pencil has seen, and its strength backed off until they agree.

A predicted KL is ½ s'ᵀF s' on held-out gradients: right near the reference where the rows are many, and told far too small by few.
What a user asks for is the KL itself. Measuring one strength takes forward passes over a few rows, since strengths follow from
evidence in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sst_kernels import Patch

from ..evaluate import Evaluation
from ..io.adapters import Adapter
from ..io.data import Dataset
from .algebra import Recompression

TRIALS = 8  # strengths that are measured at most
_NEAR = 0.8  # share of the budget that is spent well enough
_CLEAR = 1.5  # of the budget: an interval that reaches further says that the rows are too few to tell
_DRAWS, _WORST = 1000, 5


@dataclass(frozen=True)
class Choice:
    """A strength: the KL that was allowed by prediction, the patch, and the adapter as it would be written."""

    allowed: float
    patch: Patch
    adapter: Adapter
    lost: Recompression | None = None


@dataclass(frozen=True)
class Budget:
    """What became of a KL budget, in nats per label token.

    kl: measured of what was chosen, with its 95 % bootstrap interval over `rows` benign rows that stood in no pencil; the strength
    was chosen on them, too. tried: (allowed by prediction, measured) of every strength. worst: rows with the largest KL per token.
    """

    budget: float
    kl: float
    low: float
    high: float
    rows: int
    predicted: float
    tried: tuple[tuple[float, float], ...]
    worst: tuple[dict[str, Any], ...]

    @property
    def kept(self) -> bool:
        return self.kl <= self.budget

    @property
    def more_rows(self) -> int:
        """How many rows as these would bring the interval's upper end to 1.5 budgets; 0 where they do."""
        width = self.high - self.kl
        if not self.kept or self.high <= _CLEAR * self.budget or width <= 0:
            return 0
        return math.ceil(self.rows * (width / (_CLEAR * self.budget - self.kl)) ** 2) - self.rows

    def summary(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self) | {"kept": self.kept, "more_rows": self.more_rows, "words": self.words()}

    def words(self) -> str:
        """A sentence or two for people."""
        text = (
            f"measured benign KL {self.kl:.4g} ({self.low:.4g} to {self.high:.4g}) nats per label token on {self.rows} rows that were in no "
            f"pencil; budget {self.budget:g}, predicted {self.predicted:.4g}"
        )
        if len(self.tried) > 1:
            text += f"; backed off from a measured {self.tried[0][1]:.4g}"
        if self.kl == 0:
            text += ". No strength that keeps anything stays within the budget on these rows: the adapter is the task adapter alone"
        elif self.more_rows:
            text += f". These rows are too few to be sure: some {self.more_rows} more would tell whether it stays below {_CLEAR * self.budget:g}"
        return text


def hold_out(data: Mapping[str, Dataset], share: float) -> dict[str, Dataset]:
    """The data with about this share of the benign rows taken out to measure on, where no others are given for that.

    At least two of them, and never the half: with fewer than five rows nothing is taken out.
    """
    out = dict(data)
    if share == 0 or "eval_benign" in data or "benign" not in data or len(data["benign"]) < 5:
        return out
    benign = data["benign"]
    step = max(2, min(round(1 / share), len(benign) // 2))
    rest = tuple(example for i, example in enumerate(benign.examples) if i % step != step - 1)
    held = benign[step - 1 :: step]
    note = f"{len(held)} of {len(benign)} benign rows are held out: the budget is measured on them (holdout)"
    out["benign"] = replace(benign, examples=rest, notes=(*benign.notes, note))
    out["eval_benign"] = held
    return out


def within(
    budget: float, choose: Callable[[float], Choice], measure: Callable[[Choice], Evaluation], rows: Dataset
) -> tuple[Choice, Evaluation, Budget]:
    """The strongest choice found whose *measured* benign KL is at most `budget`.

    Starts where the prediction allows the budget, and backs off by measurement: in proportion, then halving (in logarithms) between
    what was too much and what was not. Where nothing is within it, nothing of the patch is kept.
    """
    low, high, allowed = 0.0, math.inf, budget
    best: tuple[Choice, Evaluation] | None = None
    tried: list[tuple[float, float]] = []
    for _ in range(TRIALS):
        choice = choose(allowed)
        found = measure(choice)
        tried.append((allowed, found.benign_kl))
        spent = choice.patch.prediction.cost_per_label  # all there is may be less than was allowed
        if found.benign_kl <= budget:
            low, best = allowed, (choice, found)
            if found.benign_kl >= _NEAR * budget or math.isinf(high):
                break
        else:
            high = min(allowed, spent) if spent > 0 else allowed
        allowed = (low * high) ** 0.5 if low else high * max(budget / found.benign_kl, 1e-2) * 0.9
        if not allowed > 0:
            break
    if best is None:
        nothing = choose(0.0)
        best = nothing, measure(nothing)
        tried.append((0.0, best[1].benign_kl))
    choice, found = best
    return choice, found, _described(budget, choice, found, rows, tried)


def _described(
    budget: float, choice: Choice, found: Evaluation, rows: Dataset, tried: list[tuple[float, float]]
) -> Budget:
    labels = {example.line: example.labels for example in rows.examples}
    records = [r for r in found.prompts if r["set"] == "benign"]
    weights = np.array([labels[r["line"]] for r in records], dtype=float)
    sums = np.array([r["benign_kl"] for r in records]) * weights
    n = len(records)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), _DRAWS)
    low, high = np.quantile((drawn @ sums) / (drawn @ weights), [0.025, 0.975])
    worst = sorted(records, key=lambda r: -r["benign_kl"])[:_WORST]
    return Budget(
        budget,
        found.benign_kl,
        float(low),
        float(high),
        n,
        choice.patch.prediction.cost_per_label,
        tuple(tried),
        tuple({key: r[key] for key in ("line", "prompt", "benign_kl") if key in r} for r in worst),
    )
