"""What is asked of a merge, answered by measurement: the merged adapter on rows that no pencil has seen, and its strength moved until they agree.

A predicted KL is ½ s'ᵀF s' on held-out gradients: right near the reference where the rows are many, and told far too small by few.
What a user asks for is the KL itself, or a rate of refusal. Strengths follow from evidence in milliseconds, so measuring one takes
forward passes, and for rates short answers, over a few rows. One search serves both questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
from scipy.stats import chi2

from sst_kernels import Patch

from ..evaluate import Evaluation
from ..io.adapters import Adapter
from ..io.data import Dataset
from ..specs import Pencil
from .algebra import Recompression

TRIALS = 8  # strengths that are measured at most
_NEAR = 0.8  # share of the budget that is spent well enough
SURE = 8  # rows from which on a mean decides, and its interval only warns; a rule of thumb: of two, means measured up to 8 budgets on others
_CLEAR = 1.5  # of the budget: an interval that reaches further says that the rows are too few to tell
_CLOSE = 1.25  # of two strengths: nearer ones are not told apart by some tens of answers
_STEP = 4.0  # from a strength that refuses too little to the next, and back
_WORST = 5
_Z = 1.959964  # 95 %


@dataclass(frozen=True)
class Choice:
    """A strength: the KL that was allowed by prediction, the patch, and the adapter as it would be written.

    pencil: the one the patch was filtered in. whole: whether all of the patch is kept, so that allowing more changes nothing.
    """

    allowed: float
    patch: Patch
    adapter: Adapter
    lost: Recompression | None = None
    pencil: Pencil | None = None
    whole: bool = False


@dataclass(frozen=True)
class Trial:
    """A strength and what was measured of it."""

    choice: Choice
    found: Evaluation


class Question(Protocol):
    """What a search looks for: a boundary on the way from keeping nothing to keeping the whole patch."""

    def beyond(self, found: Evaluation) -> bool:
        """Whether the boundary lies below what was measured."""

    def enough(self, found: Evaluation, low: float, high: float) -> bool:
        """Whether to stop, with the boundary between the strengths `low` and `high`."""

    def factor(self, found: Evaluation) -> float:
        """By how much to change a strength while only one side of the boundary is known."""


@dataclass(frozen=True)
class Within:
    """The strongest patch whose measured benign KL is at most `budget`; of fewer than eight `rows` the mean tells little, and the KL's interval
    has to end below 1.5 budgets, too."""

    budget: float
    rows: Dataset

    def beyond(self, found: Evaluation) -> bool:
        return not self._spent(found) <= self.budget

    def enough(self, found: Evaluation, low: float, high: float) -> bool:
        return not self.beyond(found) and (self._spent(found) >= _NEAR * self.budget or math.isinf(high))

    def factor(self, found: Evaluation) -> float:
        return max(self.budget / self._spent(found), 1e-2) * 0.9

    def _spent(self, found: Evaluation) -> float:
        kl, _, high = kl_interval(found, self.rows)
        if kl is None or high is None:
            return math.nan
        return kl if len(self.rows.examples) >= SURE else max(kl, high / _CLEAR)


@dataclass(frozen=True)
class Reaching:
    """The weakest patch under which at least the share `target` of harmful prompts is refused."""

    target: float

    def beyond(self, found: Evaluation) -> bool:
        return found.refusal_rate >= self.target - 1e-9

    def enough(self, found: Evaluation, low: float, high: float) -> bool:
        if not self.beyond(found):
            return False
        prompts = sum(r["set"] == "harmful" for r in found.prompts)
        return low * _CLOSE >= high or round(found.refusal_rate * prompts) == math.ceil(self.target * prompts - 1e-9)

    def factor(self, found: Evaluation) -> float:
        return 1 / _STEP if self.beyond(found) else _STEP


def search(
    start: float,
    choose: Callable[[float], Choice],
    measure: Callable[[Choice], Trial],
    question: Question,
    trials: int = TRIALS,
) -> list[Trial]:
    """Strengths around the boundary that is asked for, as they were tried.

    Begins with what is allowed at first (infinite: the whole patch), goes on by the question's factor, and halves (in logarithms)
    between what lies below the boundary and what lies beyond it.
    """
    low, high, allowed = 0.0, math.inf, start
    tried: list[Trial] = []
    for _ in range(trials):
        trial = measure(choose(allowed))
        tried.append(trial)
        spent = trial.choice.patch.prediction.cost_per_label  # all there is may be less than was allowed
        beyond = question.beyond(trial.found)
        if beyond:
            high = min(allowed, spent) if spent > 0 else allowed
        else:
            low = allowed
        if question.enough(trial.found, low, high) or (trial.choice.whole and not beyond):
            break
        if low and math.isfinite(high):
            allowed = (low * high) ** 0.5
        else:
            allowed = (high if beyond else low) * question.factor(trial.found)
        if not 0 < allowed < math.inf:
            break
    return tried


@dataclass(frozen=True)
class Measured:
    """What was measured of the adapter that was chosen, on rows that stood in no pencil; the strength was chosen on them, too.

    kl: nats per label token, with its 95 % interval over `rows` benign rows (`kl_interval`). refused: share of `prompts` harmful prompts, with
    its 95 % Wilson interval; None where no answers were generated. predicted: KL. tried: (allowed by prediction, measured) of every
    strength. worst: rows with the largest KL per token.
    """

    kl: float | None
    low: float | None
    high: float | None
    rows: int
    refused: float | None
    refused_low: float | None
    refused_high: float | None
    prompts: int
    predicted: float
    tried: tuple[tuple[float | None, float | None], ...]
    worst: tuple[dict[str, Any], ...]

    def words(self) -> str:
        """A sentence or two for people."""
        return (
            "; ".join(part for part in (self._kl_words(), self._rate_words()) if part)
            + f"; predicted KL {self.predicted:.4g}"
        )

    def summary(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self) | {"words": self.words()}

    def _kl_words(self) -> str:
        if self.kl is None:
            return "benign KL was not measured"
        return f"measured benign KL {self.kl:.4g} ({self.low:.4g} to {self.high:.4g}) nats per label token on {self.rows} rows that were in no pencil"

    def _rate_words(self) -> str:
        if self.refused is None:
            return ""
        return (
            f"{self.refused:.0%} ({self.refused_low:.0%} to {self.refused_high:.0%}) of {self.prompts} harmful prompts that were in no pencil "
            "refused"
        )


@dataclass(frozen=True)
class Budget(Measured):
    """What became of a KL budget, in nats per label token. held_back: the interval, not the KL, kept a stronger patch out."""

    budget: float = 0.0
    held_back: bool = False

    @property
    def kept(self) -> bool:
        return self.kl is not None and self.kl <= self.budget

    @property
    def more_rows(self) -> int:
        """How many rows as these would bring the interval's end to 1.5 budgets, or, where it held a stronger patch back, let most of the budget
        be spent; 0 where nothing is in doubt.
        """
        if not self.kept or not self.kl or self.high is None or not (self.held_back or self.unsure):
            return 0
        wanted = math.log(_CLEAR / _NEAR if self.held_back else _CLEAR * self.budget / self.kl)
        return max(1, math.ceil(self.rows * (math.log(self.high / self.kl) / wanted) ** 2) - self.rows)

    @property
    def unsure(self) -> bool:
        """Whether the KL of other rows may well be beyond 1.5 budgets."""
        return self.high is not None and self.high > _CLEAR * self.budget

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"kept": self.kept, "more_rows": self.more_rows}

    def words(self) -> str:
        text = f"{self._kl_words()}; budget {self.budget:g}, predicted {self.predicted:.4g}"
        if self.tried and self.tried[0][1] is not None and self.tried[0][1] > self.budget:
            text += f"; backed off from a measured {self.tried[0][1]:.4g}"
        if self.refused is not None:
            text += f"; {self._rate_words()}"
        if self.kl == 0:
            text += ". No strength that keeps anything stays within the budget on these rows: the adapter is the task adapter alone"
        elif self.more_rows and not self.held_back:
            text += f". These rows are too few to be sure: some {self.more_rows} more would tell whether it stays below {_CLEAR * self.budget:g}"
        elif self.more_rows:
            text += (
                f". These rows are too few to be sure of more: the interval has to end below {_CLEAR * self.budget:g}; with some {self.more_rows} "
                "more the budget could be spent"
            )
        return text


@dataclass(frozen=True)
class Target(Measured):
    """What became of a wanted rate of refusal. most: the largest rate that was measured on the way to the whole patch."""

    target: float = 1.0
    most: float = 0.0

    @property
    def reached(self) -> bool:
        return self.refused is not None and self.refused >= self.target - 1e-9

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"reached": self.reached}

    def words(self) -> str:
        text = f"{self._rate_words()}, target {self.target:.0%}; {self._kl_words()}; predicted KL {self.predicted:.4g}"
        if not self.reached:
            return f"{text}. The patch cannot refuse as often as asked: {self.most:.0%} is the most that any strength of it did, and this is that"
        if self.refused_low is not None and self.refused_low < self.target - 0.1:
            wanted = math.ceil(_Z**2 * self.target * (1 - self.target) / 0.05**2) if self.target < 1 else 60
            text += f". These prompts are too few to be sure: {max(wanted, 2 * self.prompts)} would tell the rate within some 5 points"
        return text


@dataclass(frozen=True)
class Knee(Measured):
    """What the point of the measured curve has from which on more KL buys little refusal. helps: any point refuses more than no patch."""

    helps: bool = True

    def words(self) -> str:
        if not self.helps:
            return f"{super().words()}. No strength refused more of these prompts than no patch does: this is the one of least KL"
        return f"{super().words()}; the knee of the measured curve, since neither a budget nor a rate was asked for"


def hold_out(data: Mapping[str, Dataset], share: float, least: int = 1) -> dict[str, Dataset]:
    """The data with about this share of the prompts of either side taken out to measure on, where no others are given for that.

    At least two of them, and never the half, all rows of a prompt together: nothing is taken out of fewer than five, or where fewer than
    `least` would be left.
    """
    out = dict(data)
    for side, what in (("harm", "refusal is"), ("benign", "the budget is")):
        if share == 0 or f"eval_{side}" in data or side not in data:
            continue
        rows = data[side]
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(e.prompt for e in rows.examples))}
        step = max(2, min(round(1 / share), len(prompts) // 2))
        if len(prompts) < 5 or len(prompts) - len(prompts) // step < least:
            continue
        out_of = [prompts[e.prompt] % step == step - 1 for e in rows.examples]
        rest = tuple(example for example, taken in zip(rows.examples, out_of) if not taken)
        held = replace(rows, examples=tuple(example for example, taken in zip(rows.examples, out_of) if taken))
        note = f"{len(held)} of {len(rows)} {side} rows are held out: {what} measured on them (holdout)"
        out[side] = replace(rows, examples=rest, notes=(*rows.notes, note))
        out[f"eval_{side}"] = held
    return out


def within(
    budget: float, choose: Callable[[float], Choice], measure: Callable[[Choice], Trial], rows: Dataset
) -> tuple[Trial, Budget, list[Trial]]:
    """The strongest strength found whose *measured* benign KL is at most `budget`, what became of it, and all that were tried.

    Starts where the prediction allows the budget. Where nothing is within it, nothing of the patch is kept.
    """
    question = Within(budget, rows)
    tried = search(budget, choose, measure, question)
    kept = [trial for trial in tried if not question.beyond(trial.found)]
    if not kept:
        kept = [measure(choose(0.0))]
        tried.append(kept[0])
    best = max(kept, key=lambda trial: trial.choice.allowed)
    stopped = [trial for trial in tried if question.beyond(trial.found)]
    held_back = len(rows.examples) < SURE and bool(stopped) and best.found.benign_kl < _NEAR * budget
    return best, Budget(**measured(best, tried, rows), budget=budget, held_back=held_back), tried


def reaching(
    target: float,
    start: float,
    ways: Sequence[Callable[[float], Choice]],
    measure: Callable[[Choice], Trial],
    rows: Dataset | None,
) -> tuple[Trial, Target, list[Trial]]:
    """The strength of least measured KL that refuses at least `target` of the harmful prompts, or the one that refuses most.

    ways: `choose` of the pencil asked for, then of others whose whole patch refuses more; each is searched where all before it end
    below the target.
    """
    question = Reaching(target)
    tried: list[Trial] = []
    for i, choose in enumerate(ways):
        tried += search(math.inf if i else start, choose, measure, question, max(1, TRIALS - len(tried)))
        if any(question.beyond(trial.found) for trial in tried):
            break
    reached = [trial for trial in tried if question.beyond(trial.found)]
    most = max(_rate(trial) for trial in tried)
    best = min(reached or [trial for trial in tried if _rate(trial) == most], key=_price)
    return best, Target(**measured(best, tried, rows), target=target, most=most), tried


def measured(trial: Trial, tried: Sequence[Trial], rows: Dataset | None) -> dict[str, Any]:
    """The fields of `Measured`, of a strength and the benign rows it was measured on."""
    found = trial.found
    kl, low, high = kl_interval(found, rows)
    refused, refused_low, refused_high, prompts = rate_interval(found)
    benign = [r for r in found.prompts if r["set"] == "benign"]
    worst = sorted(benign, key=lambda r: -r["benign_kl"])[:_WORST]
    return {
        "kl": kl,
        "low": low,
        "high": high,
        "rows": len(benign),
        "refused": refused,
        "refused_low": refused_low,
        "refused_high": refused_high,
        "prompts": prompts,
        "predicted": trial.choice.patch.prediction.cost_per_label,
        "tried": tuple((_number(t.choice.allowed), _number(t.found.benign_kl)) for t in tried),
        "worst": tuple({key: r[key] for key in ("line", "prompt", "benign_kl") if key in r} for r in worst),
    }


def kl_interval(found: Evaluation, rows: Dataset | None) -> tuple[float | None, float | None, float | None]:
    """Measured KL with its 95 % interval over rows; three times None where it was not measured.

    The mean of positive and skewed numbers is taken to be gamma distributed. Its shape follows from how the rows differ, together with one
    row more of an exponential distribution: two rows that happen to agree are no certainty.
    """
    records = [r for r in found.prompts if r["set"] == "benign"]
    if rows is None or not records or not math.isfinite(found.benign_kl):
        return None, None, None
    if found.benign_kl <= 0:
        return (found.benign_kl,) * 3
    labels = {example.line: example.labels for example in rows.examples}
    weights = np.array([labels[r["line"]] for r in records], dtype=float)
    relative = np.array([r["benign_kl"] for r in records]) / found.benign_kl - 1
    n = len(records)
    share = (weights / weights.sum()) ** 2
    spread = (
        float(share @ relative**2) / float(share.sum()) * n / max(n - 1, 1)
    )  # squared coefficient of variation of a row
    shape = 2 / (float(share.sum()) * (1 + (n - 1) * spread) / n)
    low, high = (found.benign_kl * shape / float(chi2.ppf(level, shape)) for level in (0.975, 0.025))
    return found.benign_kl, low, high


def rate_interval(found: Evaluation) -> tuple[float | None, float | None, float | None, int]:
    """Share refused with its 95 % Wilson interval, and of how many prompts; None where no answers were generated."""
    n, rate = sum(r["set"] == "harmful" for r in found.prompts), found.refusal_rate
    if not n or not math.isfinite(rate):
        return None, None, None, n
    middle = (rate + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n * n))
    return rate, max(0.0, min(rate, middle - half)), min(1.0, max(rate, middle + half)), n


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _rate(trial: Trial) -> float:
    return trial.found.refusal_rate if math.isfinite(trial.found.refusal_rate) else 0.0


def _price(trial: Trial) -> tuple[float, float]:
    """Measured KL, or where there are no benign rows what was predicted."""
    kl = trial.found.benign_kl
    return (kl if math.isfinite(kl) else trial.choice.patch.prediction.cost_per_label), trial.choice.allowed
