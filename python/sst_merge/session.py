"""A model with adapters on it: what Fisher passes, baselines and evaluations share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapters import Adapter, load_adapter
from .algebra import concatenate, transform
from .data import Dataset
from .evaluate import Evaluation, Evaluator, write_prompts
from .models import attach, check_fit, fitted, load_model
from .output import output_file
from .progress import Reporter

TASK, SAFETY, CANDIDATE = "task", "safety", "candidate"


@dataclass
class Session:
    """A model with the task and the safety adapter on it; the reference is base + task, the patch absent.

    `safety` is the adapter as given, `patch` what core coordinates are taken of: the same, until its reads are filtered.
    """

    model: Any
    tokenizer: Any
    safety: Adapter
    task: Adapter | None
    reporter: Reporter
    seconds: dict[str, float] = field(default_factory=dict)
    patch: Adapter = field(init=False)

    def __post_init__(self) -> None:
        self.patch = self.safety

    def use(self, patch: Adapter) -> None:
        """Filter `patch` from here on, in place of the safety adapter as it was given."""
        if patch is not self.patch:
            attach(self.model, SAFETY, patch)
            self.patch = patch

    @property
    def reference(self) -> str | None:
        return TASK if self.task is not None else None

    def merged(self, coordinates: Mapping[str, Tensor]) -> Adapter:
        """task + the patch at core coordinates S [r, r] per module (`Patch.coordinates`): exact, by concatenation."""
        return self._with_task(1.0, transform(self.patch, coordinates))

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


def open_session(
    model: str,
    safety: Path,
    task: Path | None = None,
    *,
    dtype: str = "float32",
    device: str = "auto",
    quantization: Mapping[str, Any] | None = None,
    reporter: Reporter,
) -> Session:
    """Load a model with its adapters. Raises ModelError or AdapterError."""
    start = time.monotonic()
    patch, base_task = load_adapter(safety), load_adapter(task) if task is not None else None
    network, tokenizer = load_model(model, dtype=dtype, device=device, quantization=quantization)
    patch, base_task = fitted(network, patch), None if base_task is None else fitted(network, base_task)
    _warn(network, [patch, base_task], reporter)
    network = attach(network, SAFETY, patch)
    if base_task is not None:
        network = attach(network, TASK, base_task)
    return Session(network, tokenizer, patch, base_task, reporter, {"load": time.monotonic() - start})


def evaluate_folders(
    model: str,
    adapters: Sequence[Path],
    task: Path | None,
    *,
    load: Callable[[Any], list[Dataset | None]],
    output: Path | None = None,
    force: bool = False,
    inputs: Sequence[Path] = (),
    generate_tokens: int = 24,
    tokens_per_batch: int = 1024,
    device: str = "auto",
    dtype: str = "float32",
    reporter: Reporter,
) -> dict[str, Evaluation]:
    """Measure adapter folders as they are; the reference (base + `task`) is the first row, named "reference".

    `load(tokenizer)` gives the harmful and the benign dataset, either may be None. `output` receives per-prompt JSON; `force` replaces a file
    there, but none of the model, the adapters and `inputs`.
    """
    given: list[str | Path] = [model, *adapters, *([task] if task is not None else []), *inputs]
    with output_file(output, force=force, inputs=given) if output is not None else nullcontext() as partial:
        folders = {str(path): load_adapter(path) for path in adapters}
        base_task = load_adapter(task) if task is not None else None
        network, tokenizer = load_model(model, dtype=dtype, device=device)
        base_task = None if base_task is None else fitted(network, base_task)
        folders = {name: fitted(network, adapter) for name, adapter in folders.items()}
        _warn(network, [base_task, *folders.values()], reporter)
        reference = None
        if base_task is not None:
            network, reference = attach(network, TASK, base_task), TASK
        harmful, benign = load(tokenizer)
        evaluator = Evaluator(
            network,
            tokenizer,
            harmful=harmful,
            benign=benign,
            reference=reference,
            tokens_per_batch=tokens_per_batch,
            reporter=reporter,
        )
        results = {"reference": evaluator(reference, label="reference", generate_tokens=generate_tokens)}
        for name, adapter in folders.items():
            evaluator.model = attach(evaluator.model, CANDIDATE, adapter)
            results[name] = evaluator(CANDIDATE, label=Path(name).name, generate_tokens=generate_tokens)
        if partial is not None:
            write_prompts(partial, results)
    return results


def _warn(model: Any, adapters: Sequence[Adapter | None], reporter: Reporter) -> None:
    given = [adapter for adapter in adapters if adapter is not None]
    bases = {adapter.base_model.rstrip("/").rsplit("/", 1)[-1]: adapter.base_model for adapter in given}
    bases.pop("", None)
    if len(bases) > 1:
        reporter.warn(
            f"the adapters name different base models, {' and '.join(bases.values())}: where the shapes agree, nothing else tells"
        )
    for adapter in given:
        for warning in [*adapter.notes, *check_fit(model, adapter)]:
            reporter.warn(f"{adapter.path}: {warning}")
