"""What looks wrong in the inputs of a merge, told before anything long is spent on them.

Errors are raised where inputs are read. These are for what can be read and run, and is likely not what was meant: adapters that do
nothing, are the same or change places, data that change places, rows too few, budgets that keep nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MergeError
from ..evaluate import Evaluator, is_refusal
from ..io.adapters import Adapter
from ..io.data import Dataset, Example
from ..io.paths import expanded, within
from ..io.peft_folder import brought
from ..progress import Reporter
from ..recipe import Recipe
from ..session import SAFETY, TASK, Session
from ..specs import Strength
from .algebra import concatenate, inner, recompress

FEW = 32  # rows of a side below which predictions are told to be weak
_MOST, _SOME = 0.5, 0.1  # shares of rows that make a mistake likely, and worth a word
_LOST, _SPARED = 0.25, 0.01  # shares of ‖ΔW‖² whose loss by recompression is likely a mistake, and not worth a word
_LARGE = 1.0  # nats per label token: another model altogether
_PROBED, _CLEAR = 16, 0.1  # rows of the first measurement, and the share of the NLL by which a difference counts
_SAFE = re.compile(r"(?i)safe|refus|harmless|guard|align")


@dataclass(frozen=True)
class Finding:
    """A remark on the inputs; `mistake`: so likely one that a merge ends unless it is told that this is meant."""

    text: str
    mistake: bool = False


def findings(recipe: Recipe, session: Session, data: Mapping[str, Dataset]) -> list[Finding]:
    """Everything about a recipe's inputs that can be known without a pass. MergeError for adapters that cannot be added."""
    return [
        *_about_places(recipe),
        *_about_strength(recipe, data),
        *_about_adapters(session.safety, session.task),
        *(_about_tokenizers(session) if session.loaded else []),
        *_about_rank(recipe.rank, session.safety, session.task),
        *_about_answers(data),
        *_about_rows(data),
    ]


def heed(found: Iterable[Finding], reporter: Reporter, *, yes: bool) -> list[str]:
    """Tell the findings, and end with a MergeError where one is likely a mistake, unless `yes`. Returns their texts, for the report."""
    found = list(found)
    mistakes = [f.text for f in found if f.mistake]
    if mistakes and not yes:
        raise MergeError(
            "this is likely a mistake:\n"
            + "\n".join(f"- {text}" for text in mistakes)
            + "\nif it is meant, go on with --yes"
        )
    for finding in found:
        reporter.warn(finding.text)
    return [f.text for f in found]


def about_refusing(session: Session, harm: Dataset, tokens_per_batch: int) -> list[Finding]:
    """Which adapter makes refusals likelier, measured by forward passes over a few rows: whether the two have changed places.

    Differences count that are more than a tenth of the NLL and two standard errors.
    """
    rows = harm[:: max(1, len(harm) // _PROBED)][:_PROBED]
    quiet = Evaluator(session.model, session.tokenizer, harmful=rows, tokens_per_batch=tokens_per_batch)

    def nll(adapter: str | None) -> list[float]:
        told = quiet(adapter, generate_tokens=0).prompts
        return [r["refusal_nll"] for r in sorted(told, key=lambda r: r["line"])]

    base, safety = nll(None), nll(SAFETY)
    task = nll(TASK) if session.task is not None else base
    told = (
        f"NLL of {len(rows)} refusals: {_mean(base):.3g} without adapters, {_mean(safety):.3g} with the safety adapter"
    )
    if session.task is not None:
        told += f", {_mean(task):.3g} with the task adapter"
    if _clearly_less(task, base) and _clearly_less(task, safety):
        return [
            Finding(f"the task adapter refuses, the safety adapter less so; have they changed places? {told}", True)
        ]
    if _clearly_less(base, safety):
        return [
            Finding(
                f"the safety adapter makes refusals less likely; is it the right one, for this chat template? {told}",
                True,
            )
        ]
    return []


def _about_places(recipe: Recipe) -> list[Finding]:
    found = []
    for name in ("model", "safety", "task"):
        given = getattr(recipe, name)
        if given is not None and expanded(given).is_dir() and within(recipe.output, given):
            found.append(
                Finding(f"output {recipe.output} lies inside the {name} {given}: whoever copies that copies both", True)
            )
    return found


def _about_strength(recipe: Recipe, data: Mapping[str, Dataset]) -> list[Finding]:
    budget, zero = recipe.kl_budget, [name for name in ("kl_budget", "k") if getattr(recipe, name) == 0]
    found = [
        Finding(f"{name}: 0 keeps nothing of the patch: the output is the task adapter alone", True) for name in zero
    ]
    if budget is not None and budget >= _LARGE:
        found.append(Finding(f"kl_budget: {budget:g} nats per label token is another model; usual are 0.001 to 0.1"))
    if (budget or recipe.strength == Strength(recipe.filter)) and "eval_benign" not in data:
        found.append(
            Finding("the KL budget is not measured, for want of rows that no pencil has seen: it rests on a prediction")
        )
    return found


def _about_adapters(safety: Adapter, task: Adapter | None) -> list[Finding]:
    found, squared = [], {}
    for name, adapter in (("safety", safety), ("task", task)):
        if adapter is None:
            continue
        squared[name] = sum(inner(adapter, adapter).values())
        silent = [n for n, t in adapter.terms.items() if not (t.A.any() and t.B.any())]
        if len(silent) == len(adapter.terms):
            found.append(
                Finding(
                    f"the {name} adapter {adapter.path} changes nothing, every A or B is zero: it was not trained", True
                )
            )
        elif silent:
            text = f"{len(silent)} of {len(adapter.terms)} modules of the {name} adapter change nothing (A or B is zero), {silent[0]} among them"
            found.append(Finding(text))
    if task is None or not all(squared.values()):
        return found
    product = sum(inner(safety, task).values())
    if product**2 > 0.99 * squared["safety"] * squared["task"]:
        times = product / squared["task"]
        scaled = f"the same but for size, the safety adapter {times:.3g} times the task adapter"
        which = "one adapter twice" if abs(times - 1) < 0.01 else scaled
        found.append(Finding(f"safety {safety.path} and task {task.path} are {which}", True))
    names = Path(safety.path).name, Path(task.path).name
    if _SAFE.search(names[1]) and not _SAFE.search(names[0]):
        found.append(
            Finding(f"task is {names[1]} and safety is {names[0]}, by their names: have they changed places?", True)
        )
    return found


def _about_tokenizers(session: Session) -> list[Finding]:
    """Adapters whose folders bring the tokenizer that they were trained with, where that is another than the model's."""
    found = []
    for name, adapter in (("safety", session.safety), ("task", session.task)):
        template, tokens = brought(adapter.path) if adapter is not None and adapter.path else (None, set())
        if template is not None and template.strip() != str(getattr(session.tokenizer, "chat_template", "")).strip():
            text = "brings a chat template that is not the model's: it was trained on prompts of another form"
            found.append(
                Finding(f"the {name} adapter {text} (template: {{chat_template: …}} takes the text of another)")
            )
        if new := sorted(tokens - session.tokenizer.get_vocab().keys()):
            text = f"brings tokens that the model's tokenizer does not have, {new[0]!r} among {len(new)}; here they are read in pieces"
            found.append(Finding(f"the {name} adapter {text}"))
    return found


def _about_rank(rank: int | None, safety: Adapter, task: Adapter | None) -> list[Finding]:
    if rank is None:
        return []
    sums = {"task + safety adapter": concatenate([(1.0, a) for a in (task, safety) if a is not None])}
    if task is not None:
        sums["task adapter alone"] = task
    lost = {name: recompress(whole, rank)[1].relative_error ** 2 for name, whole in sums.items()}
    text = "; ".join(f"{share:.0%} of ‖ΔW‖² of the {name}" for name, share in lost.items())
    worst = max(lost.values())
    return [Finding(f"rank: {rank} loses {text}", worst > _LOST)] if worst > _SPARED else []


def _about_answers(data: Mapping[str, Dataset]) -> list[Finding]:
    shares = {
        name: _share(d, lambda e: is_refusal(e.response.rpartition("</think>")[2].lstrip())) for name, d in data.items()
    }
    found = []
    for name, share in shares.items():
        path = data[name].path
        if name.endswith("harm") and share < 1 - _SOME:
            text = f"{name}: {1 - share:.0%} of the answers in {path} hold no phrase of refusal"
            more = ", and harm data are prompts with refusals; in another language, or other words, they are not recognised"
            found.append(Finding(text + (more if share < _MOST else ""), share < _MOST))
        if name.endswith("benign") and share > _SOME:
            text = f"{name}: {share:.0%} of the answers in {path} are refusals, and benign answers are what must not change"
            found.append(Finding(text, share > _MOST))
    if any(
        shares[h] < _MOST and shares[b] > _MOST
        for h, b in (("harm", "benign"), ("eval_harm", "eval_benign"))
        if {h, b} <= shares.keys()
    ):
        found.insert(0, Finding("the harm data do not refuse and the benign data do: have they changed places?", True))
    return found


def _about_rows(data: Mapping[str, Dataset]) -> list[Finding]:
    found = []
    for name, dataset in data.items():
        if len(dataset) < FEW and not name.startswith("eval"):
            found.append(
                Finding(
                    f"{name}: {len(dataset)} rows are few: a few dozen show an effect, a few hundred tell what it costs"
                )
            )
        cut = _share(dataset, lambda e: e.truncated)
        if cut > _SOME:
            found.append(Finding(f"{name}: {cut:.0%} of the answers are cut at max_length"))
        distinct = len({e.tokens for e in dataset.examples})
        if distinct < (1 - _SOME) * len(dataset):
            found.append(
                Finding(
                    f"{name}: {len(dataset) - distinct} of {len(dataset)} rows stand there twice; they are no further evidence"
                )
            )
    for first, second in (
        ("harm", "benign"),
        ("eval_harm", "harm"),
        ("eval_benign", "benign"),
        ("eval_harm", "eval_benign"),
    ):
        if first in data and second in data:
            known = {e.prompt for e in data[second].examples}
            share = _share(data[first], lambda e: e.prompt in known)  # noqa: B023 (called at once)
            if share:
                found.append(Finding(f"{share:.0%} of the prompts of {first} stand in {second}, too", share > _MOST))
    return found


def _share(data: Dataset, has: Callable[[Example], bool]) -> float:
    return sum(map(bool, map(has, data.examples))) / len(data)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _clearly_less(low: Sequence[float], high: Sequence[float]) -> bool:
    """Whether the mean of paired differences is more than `_CLEAR` of the higher one and two standard errors."""
    gaps = [b - a for a, b in zip(low, high, strict=True)]
    mean, n = _mean(gaps), len(gaps)
    error = math.sqrt(sum((g - mean) ** 2 for g in gaps) / max(1, n - 1) / n)
    return mean > max(_CLEAR * _mean(high), 2 * error)
