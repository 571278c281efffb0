"""Passes over a batch beside the plain PEFT step they ride on: time, memory, launches, host synchronisations.

`beside` is the harness: it takes what is plain and any number of named calls, each with the context that makes it what it is
(hooks, trained weights), runs them in turn and returns the columns of their rows.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import sst_kernels as sst
from bench.common import Ceilings, Recorder, Turn, count_calls, free, in_turn, peak_mib
from bench.shapes import Shape
from bench.workload import Variant, build_model, token_batch

MU = 3.0  # what recipes weigh benign inputs with


def beside(plain: Turn, runs: Mapping[str, Turn], device: str, repeats: int = 5) -> dict[str, dict[str, Any]]:
    """The columns of a row for each of `runs`, taken in turn with `plain`, and under the name "" for `plain` itself.

    `ratio` is the median over rounds of a run's time over the plain one's in the same round; memory and calls are those of a further call.
    """
    turns = {"": plain, **runs}
    timed = in_turn(turns, device, repeats)
    columns: dict[str, dict[str, Any]] = {}
    for name, turn in turns.items():
        run, context = turn if isinstance(turn, tuple) else (turn, nullcontext)
        with context():
            row = timed[name].columns() | {"peak_mib": peak_mib(run, device)}
            if device.startswith("cuda"):
                row["launches"], row["syncs"] = count_calls(run, device)
        if name:
            row |= {"plain_ms": timed[""].median, "ratio": timed[name].over(timed[""])}
            row["above_plain_mib"] = row["peak_mib"] - columns[""]["peak_mib"]
        columns[name] = row
    return columns


VARIANTS = {
    "core/full": Variant("core", "full"),
    "core/lowrank l=256": Variant("core", "lowrank", {"rank": 256}),
    "core/full frozen": Variant("core", "full", frozen=True),
    "core/full frozen, sampled labels at S=0": Variant("core", "full", {"point": "reference"}, True, True),
    "factor/diagonal": Variant("factor", "diagonal"),
    "factor/kronecker_lowrank l=64": Variant("factor", "kronecker_lowrank", {"rank": 64}),
    "core/diagonal": Variant("core", "diagonal"),
}


class Pass:
    """A model and a batch, and the step that is timed: forward, loss, backward, gradients dropped."""

    def __init__(self, model: Any, batch: dict[str, torch.Tensor], labels: str = ""):
        self.model, self.batch, self.labels = (
            model,
            batch,
            labels,
        )  # "": the model's own loss, with the logits of all positions

    def __call__(self) -> None:
        if self.labels:
            sst.sequence_nll(self.model, self.batch, labels=self.labels).backward()
        else:
            self.model(**self.batch).loss.backward()
        self.model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Setting:
    """What rows of passes are measured at."""

    shape: Shape
    rank: int
    targets: str
    batch: int
    length: int
    device: str
    dtype: torch.dtype
    repeats: int = 5
    checkpointing: bool = False

    @property
    def columns(self) -> dict[str, Any]:
        return {"rank": self.rank, "targets": self.targets, "batch": self.batch, "length": self.length}

    def model(self, shape: Shape | None = None) -> Any:
        return build_model(
            shape or self.shape, rank=self.rank, targets=self.targets, length=self.length, device=self.device, dtype=self.dtype
        )  # fmt: skip

    def tokens(self, seed: int = 0) -> dict[str, torch.Tensor]:
        return token_batch(self.shape, self.batch, self.length, self.device, seed=seed)


def fisher_passes(
    at: Setting, record: Recorder, ceilings: Ceilings, variants: Mapping[str, Variant] = VARIANTS
) -> dict[str, float]:
    """Rows of the plain step and of every variant, each in turn with a plain step of its own kind; returns median ms per variant."""
    model, tokens = at.model(), at.tokens()
    suffix = ""
    if at.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        suffix = ", checkpointing"
    flops = at.shape.step_flops(at.batch, at.length, at.rank, at.targets) * (1.5 if at.checkpointing else 1.0)
    found: dict[str, float] = {}
    step = Pass(model, tokens)
    for name, variant in variants.items():
        try:
            hooks = variant.hooks(model, step)
            plain = (step, partial(_frozen if variant.frozen else trained, model))
            own = (Pass(model, tokens, "model" * variant.sampled), partial(hooked, model, variant.frozen, hooks))
            rows = beside(plain, {name: own}, at.device, at.repeats)
        except Exception as error:  # one variant that fails must not cost the others
            traceback.print_exc()
            basis = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
            note = f"{type(error).__name__}: {str(error)[:160]}"
            record("pass", name + suffix, **at.columns, basis=basis, note=note)
            continue
        if not found:
            work = {"flops": flops, "floor_ms": ceilings.floor_ms(flops=flops)}
            record("pass", "plain" + suffix, **at.columns, **rows[""], **work)
        moved = _added_bytes(at, variant.space)
        record(
            "pass", name + suffix, **at.columns, **rows[name], state_bytes=hooks.fisher.nbytes,
            bytes=moved, floor_ms=ceilings.floor_ms(moved),
        )  # fmt: skip
        found[name] = rows[name]["ms"]
        free(at.device)
    return found


@contextmanager
def trained(model: Any) -> Iterator[None]:
    """Gradients for the adapter's own weights."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and ".safety." in name)
    yield
    model.requires_grad_(False)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Gradients that start at the embeddings of a frozen model, as those of a frozen Fisher pass do."""
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def hooked(model: Any, frozen: bool, hooks: AbstractContextManager) -> Iterator[None]:
    with nullcontext(model.requires_grad_(False)) if frozen else trained(model), hooks:
        yield


def _added_bytes(at: Setting, space: str) -> float:
    """Least bytes the statistics add to the step: each side of every block read once, at two bytes per element."""
    sides = at.shape.modules(at.targets).values()
    return 2.0 * at.batch * at.length * sum(2 * at.rank + (p + q) * (space == "factor") for p, q in sides)
