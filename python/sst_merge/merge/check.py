"""`sst-merge check` and `--dry-run`: the first steps of a run on a model without weights, and what the run would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..io.data import Dataset, rendered_example
from ..io.models import resolve_device
from ..io.output import check_output
from ..progress import Reporter
from ..recipe import Recipe
from ..run.memory import check_pencil
from ..run.own_prompts import foreseen
from .findings import Finding, findings
from .pipeline import check_folds, load_data, session_of
from .plan import Plan, lines, plan
from .source import load_evidence


@dataclass(frozen=True)
class Checked:
    """What is known of a recipe without a pass."""

    recipe: Recipe
    plan: Plan
    data: Mapping[str, Dataset]
    findings: tuple[Finding, ...]

    @property
    def mistakes(self) -> list[str]:
        return [f.text for f in self.findings if f.mistake]

    def text(self) -> str:
        """For people: one rendered example of each data set, findings, plan."""
        parts, shown = [], set()
        for name, data in self.data.items():
            parts += [f"{name}: {data.path}, {len(data)} rows, {data.kind}", *(f"  {note}" for note in data.notes)]
            if data.shown not in shown:  # rows held out of a file show what the file does
                parts += [f"  as the model sees it, between ⟦ and ⟧ what carries loss:\n{rendered_example(data)}", ""]
            shown.add(data.shown)
        parts += [f"{'likely a mistake' if f.mistake else 'note'}: {f.text}" for f in self.findings]
        return "\n".join([*parts, *lines(self.recipe, self.plan), _UNKNOWN])

    def facts(self) -> dict[str, Any]:
        """For programs, as JSON-able values."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "data": {name: data.summary() for name, data in self.data.items()},
            "examples": {name: data.example for name, data in self.data.items()},
            "findings": [asdict(f) for f in self.findings],
            "plan": asdict(self.plan) | {"seconds": self.plan.seconds, "peak_bytes": self.plan.peak_bytes},
        }


_UNKNOWN = "not known without a pass: whether the safety adapter refuses and the task adapter does not; the first step of a run measures that"


def check(recipe: Recipe, *, force: bool = False, reporter: Reporter | None = None) -> Checked:
    """Everything that a run of this recipe does before its first pass, on meta tensors in place of the model's weights.

    Raises MergeError as the run would.
    """
    check_output(recipe.output, force=force)
    session = session_of(recipe, reporter or Reporter(quiet=True), weights=False)
    data = load_data(recipe, session.tokenizer, foreseen) if recipe.files else {}
    if recipe.evidence is not None:
        load_evidence(recipe.evidence, session)
    else:
        check_folds(recipe, data)
        check_pencil(recipe, session.safety, data, resolve_device(recipe.device))
    found = tuple(findings(recipe, session, data))
    return Checked(recipe, plan(recipe, session, data), data, found)
