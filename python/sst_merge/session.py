"""A model with adapters on it: what Fisher passes, baselines and evaluations share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import MergeError, ModelError
from .evaluate import Evaluation, Evaluator, write_prompts
from .io.adapters import Adapter, load_adapter
from .io.data import load_dataset, rendered_example
from .io.fit import attach, check_fit, fitted
from .io.models import load_model, load_skeleton
from .io.output import output_file
from .merge.algebra import concatenate, transform
from .progress import Reporter
from .recipe import Recipe

TASK, SAFETY, CANDIDATE = "task", "safety", "candidate"


class Session:
    """A model with the task and the safety adapter on it; the reference is base + task, the patch absent.

    The model is loaded when it is first asked for: what follows from evidence alone never asks. `safety` is the adapter as given,
    `patch` the one on the model: the same, until passes of their own want its reads filtered. weights: False on meta tensors.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        safety: Adapter,
        task: Adapter | None,
        reporter: Reporter,
        *,
        weights: bool = True,
    ):
        self.weights = weights
        self.safety, self.task, self.patch, self.reporter = safety, task, safety, reporter
        self.seconds: dict[str, float] = {}
        self._load = load
        self._loaded: tuple[Any, Any] | None = None

    @property
    def model(self) -> Any:
        """The PEFT model, both adapters on it; the bare one where it has no weights. Raises ModelError or AdapterError when it is loaded."""
        return self._network()[0]

    @property
    def tokenizer(self) -> Any:
        return self._network()[1]

    @property
    def loaded(self) -> bool:
        """Whether anybody has asked for the model."""
        return self._loaded is not None

    @property
    def reference(self) -> str | None:
        return TASK if self.task is not None else None

    def use(self, patch: Adapter) -> None:
        """Put `patch` on the model in place of the safety adapter as it was given."""
        if patch is not self.patch:
            attach(self.model, SAFETY, patch)
            self.patch = patch

    def merged(self, patch: Adapter, coordinates: Mapping[str, Tensor]) -> Adapter:
        """task + `patch` at core coordinates S [r, r] per module (`Patch.coordinates`): exact, by concatenation."""
        return self._with_task(1.0, transform(patch, coordinates))

    def plain(self, alpha: float) -> Adapter:
        """task + α · safety: task arithmetic, the baseline."""
        return self._with_task(alpha, self.safety)

    def measure(self, evaluator: Evaluator, adapter: Adapter, label: str, **options: Any) -> Evaluation:
        """Put an adapter on the model, evaluate it, take it off again."""
        attach(self.model, CANDIDATE, adapter)
        try:
            return evaluator(CANDIDATE, label=label, **options)
        finally:
            self.model.delete_adapter(CANDIDATE)

    def _with_task(self, weight: float, patch: Adapter) -> Adapter:
        return concatenate([*([(1.0, self.task)] if self.task is not None else []), (weight, patch)])

    def _network(self) -> tuple[Any, Any]:
        if self._loaded is None:
            start = time.monotonic()
            network, tokenizer = self._load()
            self.safety = self.patch = fitted(network, self.safety)
            self.task = None if self.task is None else fitted(network, self.task)
            _check(network, [self.safety, self.task], self.reporter)
            if self.weights:
                network = attach(network, SAFETY, self.safety)
            if self.task is not None and self.weights:
                network = attach(network, TASK, self.task)
            self._loaded = network, tokenizer
            self.seconds["load"] = time.monotonic() - start
        return self._loaded


def open_session(
    model: str | None,
    safety: Path,
    task: Path | None = None,
    *,
    dtype: str = "float32",
    device: str = "auto",
    quantization: Mapping[str, Any] | None = None,
    weights: bool = True,
    loaded: tuple[Any, Any] | None = None,
    reporter: Reporter,
) -> Session:
    """Adapters, and a model that is loaded when asked for, if it is not given as `loaded` (with its tokenizer); on meta tensors without `weights`.

    Raises AdapterError, and ModelError when the model is loaded.
    """

    def load() -> tuple[Any, Any]:
        if loaded is not None:
            return loaded
        if model is None:
            raise ModelError("this needs the model: give --model")
        read = load_model if weights else load_skeleton
        return read(model, dtype=dtype, device=device, quantization=quantization)

    patch, base_task = load_adapter(safety), load_adapter(task) if task is not None else None
    _warn([patch, base_task], reporter)
    return Session(load, patch, base_task, reporter, weights=weights)


def evaluate_folders(
    recipe: Recipe,
    adapters: Sequence[Path],
    *,
    output: Path | None = None,
    force: bool = False,
    reporter: Reporter,
) -> dict[str, Evaluation]:
    """Measure adapter folders as they are; the reference (base + the recipe's task adapter) is the first row, named "reference".

    The recipe's `harm_data` and `benign_data` are what is measured on; either may be missing. `output` receives per-prompt JSON; `force`
    replaces a file there, but none of the inputs. Raises MergeError.
    """
    files = {"harm": recipe.harm_data, "benign": recipe.benign_data}
    if not any(files.values()):
        raise MergeError("nothing to measure on: give --harm-data, --benign-data or both")
    if recipe.model is None:
        raise MergeError("model: is required; give --model")
    torch.manual_seed(recipe.seed)
    given: list[str | Path] = [
        recipe.model,
        *adapters,
        *(path for path in (recipe.task, *files.values()) if path is not None),
    ]
    with output_file(output, force=force, inputs=given) if output is not None else nullcontext() as partial:
        folders = {str(path): load_adapter(path) for path in adapters}
        base_task = load_adapter(recipe.task) if recipe.task is not None else None
        network, tokenizer = load_model(
            recipe.model, dtype=recipe.dtype, device=recipe.device, quantization=recipe.quantization
        )
        base_task = None if base_task is None else fitted(network, base_task)
        folders = {name: fitted(network, adapter) for name, adapter in folders.items()}
        _warn([base_task, *folders.values()], reporter)
        _check(network, [base_task, *folders.values()], reporter)
        reference = None
        if base_task is not None:
            network, reference = attach(network, TASK, base_task), TASK
        data = {
            name: load_dataset(path, tokenizer, **recipe.reading) for name, path in files.items() if path is not None
        }
        for name, dataset in data.items():
            reporter.detail(f"{name}, as the model sees it, labels marked:\n{rendered_example(dataset)}")
        evaluator = Evaluator(
            network,
            tokenizer,
            harmful=data.get("harm"),
            benign=data.get("benign"),
            reference=reference,
            tokens_per_batch=recipe.tokens_per_batch,
            reporter=reporter,
        )
        options: dict[str, Any] = {"generate_tokens": recipe.generate_tokens}
        results = {"reference": evaluator(reference, label="reference", **options)}
        for name, adapter in folders.items():
            evaluator.model = attach(evaluator.model, CANDIDATE, adapter)
            results[name] = evaluator(CANDIDATE, label=Path(name).name, **options)
        if partial is not None:
            write_prompts(partial, results)
    return results


def _warn(adapters: Sequence[Adapter | None], reporter: Reporter) -> None:
    given = [adapter for adapter in adapters if adapter is not None]
    bases = {adapter.base_model.rstrip("/").rsplit("/", 1)[-1]: adapter.base_model for adapter in given}
    bases.pop("", None)
    if len(bases) > 1:
        reporter.warn(
            f"the adapters name different base models, {' and '.join(bases.values())}: where the shapes agree, nothing else tells"
        )


def _check(model: Any, adapters: Sequence[Adapter | None], reporter: Reporter) -> None:
    for adapter in filter(None, adapters):
        for warning in [*adapter.notes, *check_fit(model, adapter)]:
            reporter.warn(f"{adapter.path}: {warning}")
