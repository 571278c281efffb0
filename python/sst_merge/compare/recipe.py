"""What a comparison is: a recipe with two more entries.

methods: [sst, ties, tsv-m]            names in `sst_merge.methods`; "no patch" and "plain" are always there
strengths: {ties: [0.3, 1.0]}          instead of a method's own sweep
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field, field_validator, model_validator

from ..methods import Method, find
from ..recipe import Recipe, read_yaml

ALWAYS = ("no patch", "plain")
DEFAULT = (
    "sst",
    "sst-module",
    "diagonal-sst",
    "fisher-average",
    "regmean",
    "ties",
    "dare-linear",
    "tsv-m",
    "random-subspace",
)
# Entries of a merge recipe that say which patch to make: here the methods and their strengths do.
OF_METHODS = {
    "structure", "structure_options", "scope", "metric", "harm_points", "benign_point", "filter", "kl_budget", "target_refusal", "mu", "k", "sweep",
}  # fmt: skip
Strength = Annotated[float, Field(allow_inf_nan=False)]


class Comparison(Recipe):
    """Everything a comparison depends on. `Comparison.load` raises RecipeError for what a recipe refuses, unknown methods,
    unusable strengths and missing evaluation data."""

    eval_harm_data: Path = Field(description="JSONL: other harmful prompts, to measure on")
    eval_benign_data: Path = Field(description="JSONL: other benign prompts, to measure on")
    methods: list[str] = Field(list(DEFAULT), validate_default=True, description="names in sst_merge.methods")
    strengths: dict[str, Annotated[list[Strength], Field(min_length=1)]] = Field(
        default_factory=dict, description="a method's strengths"
    )

    @model_validator(mode="before")
    @classmethod
    def _patches_are_made_by_methods(cls, values: Any) -> Any:
        if isinstance(values, dict) and (given := sorted(values.keys() & OF_METHODS)):
            raise ValueError(
                f"{', '.join(given)}: which patches are compared is said by `methods` and `strengths` (such as {{sst: [0.02]}}, a KL "
                "budget); remove what belongs to a merge"
            )
        return values

    @field_validator("methods")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        return [find(name).name for name in dict.fromkeys([*ALWAYS, *names])]

    @model_validator(mode="after")
    def _strengths_of_methods(self) -> Comparison:
        for name, given in self.strengths.items():
            if find(name).name not in self.methods:
                raise ValueError(f"strengths: {name!r} is not among the methods; add it there")
            if name == "no patch":
                raise ValueError("strengths: 'no patch' has none; remove its entry")
            if len(set(given)) < len(given):
                raise ValueError(f"strengths: {name!r} has a number twice in {given}")
        return self

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Comparison:
        return cast("Comparison", cls.parse({**read_yaml(path), **overrides}, where=str(path)))

    @property
    def files(self) -> dict[str, Path]:
        """All data files: methods that look at activations read those to fit on even where there is evidence."""
        given = {"harm": self.harm_data, "benign": self.benign_data, **super().files}
        return {name: path for name, path in given.items() if path is not None}

    @property
    def sweeps(self) -> list[tuple[Method, list[float]]]:
        """The methods in order, each with its strengths."""
        return [(m, self.strengths.get(m.name, list(m.strengths))) for m in map(find, self.methods)]
