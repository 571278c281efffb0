"""What a run would cost, told before it starts: passes, tokens, seconds and bytes, as estimates."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sst_kernels.inputs.moments import columns

from ..io.adapters import Adapter
from ..io.data import Dataset
from ..io.models import DTYPES, resolve_device
from ..io.paths import expanded
from ..recipe import Recipe
from ..run.memory import fisher_memory
from ..session import Session

_EFFICIENCY = 0.5  # of a large matrix product's rate, which forward and backward passes of small batches reach


@dataclass(frozen=True)
class Plan:
    """Estimates of one run; `passes` maps its stages to (tokens, seconds)."""

    parameters: int
    coordinates: int
    flops_per_second: float
    passes: dict[str, tuple[int, float]]
    memory: dict[str, int]

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.passes.values())

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())


def plan(recipe: Recipe, session: Session, data: Mapping[str, Dataset]) -> Plan:
    """Estimate the cost of a run of this recipe, from a session without weights.

    Seconds come from a short matrix product on the recipe's device; 2 flops per parameter and token forward, as many
    backward (frozen weights).
    """
    safety = session.safety
    if recipe.model is None:
        return Plan(0, sum(term.rank**2 for term in safety.terms.values()), 0.0, {}, {})
    adapters = [safety, *([session.task] if session.task is not None else [])]
    base = session.model
    parameters = sum(p.numel() for p in base.parameters())
    rate = _flops_per_second(resolve_device(recipe.device), DTYPES[recipe.dtype])

    def stage(name: str, repeats: int, flops: int) -> tuple[int, float]:
        tokens = data[name].summary()["tokens"] * repeats
        return tokens, tokens * flops * parameters / (rate * _EFFICIENCY)

    passes = {}
    if (
        recipe.evidence is None and recipe.from_evidence
    ):  # one forward pass, and a backward pass for each loss and label draw
        losses = 2 if recipe.opening_tokens and recipe.opening_apart else 1
        passes = {
            "reading, harm": stage("harm", 1, 2 + 2 * losses),
            "reading, benign": stage("benign", 1, 2 + 2 * recipe.label_draws),
        }
        passes |= {"reading, safe": stage("safe", 1, 4)} if "safe" in data else {}
    elif recipe.evidence is None:
        if recipe.input_filter:
            passes = {"inputs, harm": stage("harm", 1, 2), "inputs, benign": stage("benign", 1, 2)}
        passes |= {
            "Fisher, harm": stage("harm", len(recipe.harm_points), 4),
            "Fisher, benign": stage("benign", recipe.label_draws, 4),
        }
    for name, forwards in (("eval_harm", 3), ("eval_benign", 3)):
        if name in data:
            passes[f"evaluation, {name.removeprefix('eval_')}"] = stage(name, forwards, 2)
    coordinates = sum(term.rank**2 for term in safety.terms.values())
    memory = _memory(recipe, base.config.get_text_config(), parameters, adapters)
    memory |= fisher_memory(recipe, safety, data) if recipe.evidence is None else {}
    if "reading, harm" in passes:
        rows = (
            len(data["harm"]) * (2 if recipe.opening_tokens and recipe.opening_apart else 1)
            + len(data["benign"]) * recipe.label_draws
            + len(data.get("safe", ()))
        )
        memory["gradients at most"] = 4 * rows * sum(term.rank * term.A.shape[1] for term in safety.terms.values())
    if recipe.input_filter and recipe.evidence is None:
        widths = [term.A.shape[1] for term in safety.terms.values()]
        memory["inputs at most"] = sum(8 * d * columns(d, recipe.input_rank) for d in widths)
    return Plan(parameters, coordinates, rate, passes, memory)


def _memory(recipe: Recipe, config: Any, parameters: int, adapters: list[Adapter]) -> dict[str, int]:
    width = DTYPES[recipe.dtype].itemsize
    hidden, layers, inner = config.hidden_size, config.num_hidden_layers, getattr(config, "intermediate_size", None)
    per_token = layers * (10 * hidden + 4 * (inner or 4 * hidden))
    return {
        "model and adapters": width * (parameters + sum(a.parameters for a in adapters)),
        "activations": width * recipe.tokens_per_batch * per_token,
        "logits": recipe.tokens_per_batch * config.vocab_size * (width + 8),
    }


def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size // 4, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    assert result.shape == (size // 4, size)
    return 2 * (size // 4) * size * size / best


def lines(recipe: Recipe, made: Plan) -> list[str]:
    """The plan as text."""
    text = [
        f"model       {recipe.model}: {made.parameters / 1e6:,.0f} M parameters, {recipe.dtype}",
        f"coordinates {made.coordinates:,} (core space, all modules), scope {recipe.scope}",
        f"machine     {made.flops_per_second / 1e9:,.0f} GFLOP/s in a matrix product, half of that assumed",
    ]
    text += [f"pass        {name}: {n:,} tokens, about {_duration(s)}" for name, (n, s) in made.passes.items()]
    text += [f"memory      {name}: {size / 2**20:,.0f} MiB" for name, size in made.memory.items()]
    total = f"about {_duration(made.seconds)} and {made.peak_bytes / 2**30:.1f} GiB"
    text.append(f"total       {total}; generated answers, and rows that the model writes, are not in the estimate")
    return [*text, f"output      {expanded(recipe.output).absolute()} (nothing was written)"]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
