"""A model with adapters on it: what Fisher passes, baselines and evaluations share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import ModelError
from .evaluate import Evaluation, Evaluator, write_prompts
from .io.adapters import Adapter, load_adapter
from .io.models import attach, check_fit, fitted, load_model
from .io.output import output_file
from .merge.algebra import concatenate, load_sum, transform
from .progress import Reporter
from .recipe import summands

TASK, SAFETY, CANDIDATE = "task", "safety", "candidate"


class Session:
    """A model with the task and the safety adapter on it; the reference is base + task, the patch absent.

    The model is loaded when it is first asked for: what follows from evidence alone never asks. `safety` is the adapter as given,
    `patch` the one on the model: the same, until passes of their own want its reads filtered.
    """

    def __init__(self, load: Callable[[], tuple[Any, Any]], safety: Adapter, task: Adapter | None, reporter: Reporter):
        self.safety, self.task, self.patch, self.reporter = safety, task, safety, reporter
        self.seconds: dict[str, float] = {}
        self._load = load
        self._loaded: tuple[Any, Any] | None = None

    @property
    def model(self) -> Any:
        """The PEFT model, both adapters on it. Raises ModelError or AdapterError when it is loaded."""
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
            network = attach(network, SAFETY, self.safety)
            if self.task is not None:
                network = attach(network, TASK, self.task)
            self._loaded = network, tokenizer
            self.seconds["load"] = time.monotonic() - start
        return self._loaded


def open_session(
    model: str | None,
    safety: Path | Mapping[Path, float],
    task: Path | Mapping[Path, float] | None = None,
    *,
    dtype: str = "float32",
    device: str = "auto",
    quantization: Mapping[str, Any] | None = None,
    reporter: Reporter,
) -> Session:
    """Adapters, and a model that is loaded when asked for. Raises AdapterError, and ModelError when it is loaded."""

    def load() -> tuple[Any, Any]:
        if model is None:
            raise ModelError("this needs the model: give --model")
        return load_model(model, dtype=dtype, device=device, quantization=quantization)

    patch, base_task = load_sum(safety), load_sum(task) if task is not None else None
    _warn([patch, base_task], reporter)
    return Session(load, patch, base_task, reporter)


def evaluate_folders(
    model: str,
    adapters: Sequence[Path],
    task: Path | Mapping[Path, float] | None,
    *,
    load: Callable[[Any], dict[str, Any]],
    output: Path | None = None,
    force: bool = False,
    inputs: Sequence[Path] = (),
    generate_tokens: int = 24,
    device: str = "auto",
    dtype: str = "float32",
    reporter: Reporter,
) -> dict[str, Evaluation]:
    """Measure adapter folders as they are; the reference (base + `task`) is the first row, named "reference".

    `load(tokenizer)` gives what to measure on and how: arguments of `Evaluator`. `output` receives per-prompt JSON; `force` replaces a file
    there, but none of the model, the adapters and `inputs`.
    """
    given: list[str | Path] = [model, *adapters, *(summands(task) if task is not None else []), *inputs]
    with output_file(output, force=force, inputs=given) if output is not None else nullcontext() as partial:
        folders = {str(path): load_adapter(path) for path in adapters}
        base_task = load_sum(task) if task is not None else None
        network, tokenizer = load_model(model, dtype=dtype, device=device)
        base_task = None if base_task is None else fitted(network, base_task)
        folders = {name: fitted(network, adapter) for name, adapter in folders.items()}
        _warn([base_task, *folders.values()], reporter)
        _check(network, [base_task, *folders.values()], reporter)
        reference = None
        if base_task is not None:
            network, reference = attach(network, TASK, base_task), TASK
        evaluator = Evaluator(network, tokenizer, reference=reference, reporter=reporter, **load(tokenizer))
        results = {"reference": evaluator(reference, label="reference", generate_tokens=generate_tokens)}
        for name, adapter in folders.items():
            evaluator.model = attach(evaluator.model, CANDIDATE, adapter)
            results[name] = evaluator(CANDIDATE, label=Path(name).name, generate_tokens=generate_tokens)
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
