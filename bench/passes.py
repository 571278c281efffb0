"""Fisher passes beside the plain training step they ride on: time, memory, launches, host synchronisations."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import sst_kernels as sst
from bench.common import Ceilings, Recorder, count_calls, free, in_turn, measure, peak_mib
from bench.shapes import Shape
from bench.workload import build_model, token_batch


@dataclass(frozen=True)
class Variant:
    """One way to run the pass; `layers` restricts it to the first few (for states that would not fit)."""

    name: str
    space: str
    structure: str
    options: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    sampled: bool = False
    layers: int | None = None


# In order of importance. Drop-in passes run in the user's training step, which also computes the adapter's own gradients;
# frozen ones are the passes of a merge, which do not.
VARIANTS = (
    Variant("core/full", "core", "full"),
    Variant("core/lowrank l=256", "core", "lowrank", {"rank": 256}),
    Variant("core/full frozen", "core", "full", frozen=True),
    Variant(
        "core/full frozen, sampled labels at S=0", "core", "full", {"point": "reference"}, frozen=True, sampled=True
    ),
    Variant("factor/diagonal", "factor", "diagonal"),
    Variant("factor/kronecker_lowrank l=64", "factor", "kronecker_lowrank", {"rank": 64}),
    Variant("core/diagonal", "core", "diagonal"),
    Variant("factor/kronecker dense", "factor", "kronecker", layers=2),
)


class Pass:
    """A model and a batch, and the step that is timed: forward, loss, backward, gradients dropped."""

    def __init__(self, model: Any, batch: dict[str, torch.Tensor], sampled: bool = False):
        self.model, self.batch, self.sampled = model, batch, sampled

    def __call__(self) -> None:
        if self.sampled:
            sst.sequence_nll(self.model, self.batch, labels="model").backward()
        else:
            self.model(**self.batch).loss.backward()
        self.model.zero_grad(set_to_none=True)


def fisher_passes(
    shape: Shape,
    record: Recorder,
    ceilings: Ceilings,
    *,
    rank: int,
    targets: str,
    batch: int,
    length: int,
    device: str,
    dtype: torch.dtype,
    checkpointing: bool = False,
    adapter_dtype: torch.dtype | None = None,
    variants: tuple[Variant, ...] = VARIANTS,
    repeats: int = 5,
    time_left: Callable[[], float] = lambda: float("inf"),
) -> dict[str, float]:
    """Rows of one model; returns median ms per variant name, "plain" and "plain frozen" among them."""
    model = build_model(
        shape, rank=rank, targets=targets, length=length, device=device, dtype=dtype, adapter_dtype=adapter_dtype
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    tokens = token_batch(shape, batch, length, device)
    suffix = (", checkpointing" if checkpointing else "") + (
        ", float32 adapters" if adapter_dtype is torch.float32 else ""
    )
    common = {"batch": batch, "length": length, "rank": rank, "targets": targets}
    flops = shape.step_flops(batch, length, rank, targets) * (1.5 if checkpointing else 1.0)
    plain_columns = common | {"flops": flops, "floor_ms": ceilings.floor_ms(0.0, flops)}
    results: dict[str, float] = {}
    try:
        train_adapters(model)
        first = measure(Pass(model, tokens), device, repeats=repeats, warmup=2)
        record("pass", f"plain{suffix}", first, **plain_columns, **_calls(Pass(model, tokens), device))
        results["plain"] = first.median
        for variant in variants:
            if time_left() < 4e-3 * repeats * first.median + 5:
                record("pass", variant.name + suffix, **common, basis="skipped", note="time budget spent")
                continue
            try:
                results |= _one(variant, model, tokens, record, common, shape, ceilings, device, suffix, repeats)
            except Exception as error:  # one variant that fails must not cost the others
                _failed(record, variant.name + suffix, common, error)
            free(device)
    except torch.OutOfMemoryError as error:
        _failed(record, f"plain{suffix}", common, error)
    return results


def _one(variant, model, tokens, record, common, shape, ceilings, device, suffix, repeats) -> dict[str, float]:
    """One variant and the plain step in turn, which cancels drift."""
    options = dict(variant.options)
    if variant.layers is not None:
        options["modules"] = "|".join(rf"model\.layers\.{i}\..*" for i in range(variant.layers))
    accumulator = sst.fisher_accumulate(
        model, "safety", space=variant.space, structure=variant.structure, **options
    )  # fmt: skip
    plain, step = Pass(model, tokens), Pass(model, tokens, variant.sampled)
    turns = {
        "plain": (plain, lambda: _bare(model, variant.frozen)),
        "hooked": (step, lambda: _hooked(model, variant.frozen, accumulator)),
    }
    timed = in_turn(turns, device, repeats)
    peaks = {}
    for name, (run, context) in turns.items():
        with context():
            peaks[name] = peak_mib(run, device)
            calls = _calls(run, device)
    state, adapted = accumulator.fisher.nbytes, len({block.module for block in accumulator.fisher.blocks.values()})
    modules, above = len(shape.modules(common["targets"])), peaks["hooked"] - peaks["plain"]
    note = f"peak {max(0.0, above):.0f} MiB above plain"
    reference, basis = timed["plain"].median, "measured"
    added = timed["hooked"].median - reference
    if adapted < modules:
        note = f"{note}; {adapted} of {modules} modules measured, overhead scaled"
        added, state, basis = added * modules / adapted, int(state * modules / adapted), "scaled"
    extra = _added_bytes(shape, variant, common) if adapted == modules else None
    record(
        "pass",
        variant.name + suffix,
        timed["hooked"],
        **common,
        ms=reference + added,
        ratio=1 + added / reference,
        basis=basis,
        peak_mib=peaks["hooked"],
        state_bytes=state,
        bytes=extra,
        floor_ms=None if extra is None else ceilings.floor_ms(extra),
        **calls,
        above_plain_mib=above,
        plain_ms=reference,
        note=note,
    )
    return {variant.name: reference + added, f"plain for {variant.name}": reference}


@contextmanager
def _bare(model: Any, frozen: bool) -> Iterator[None]:
    """The plain step: the adapters' own gradients, or in a frozen model those that start at the embeddings, as a frozen Fisher pass has."""
    model.requires_grad_(False)
    if not frozen:
        train_adapters(model)
        yield
        return
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    yield
    handle.remove()


@contextmanager
def _hooked(model: Any, frozen: bool, accumulator: Any) -> Iterator[None]:
    model.requires_grad_(False)
    if not frozen:
        train_adapters(model)
    with accumulator:
        yield


def _failed(record: Recorder, name: str, common: dict[str, Any], error: Exception) -> None:
    if not isinstance(error, torch.OutOfMemoryError):
        traceback.print_exception(error)
    basis = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
    record("pass", name, **common, basis=basis, note=f"{type(error).__name__}: {str(error)[:160]}")


def _calls(step: Pass, device: str) -> dict[str, int]:
    """Kernel launches and host synchronisations of one step; a CPU has neither."""
    return dict(zip(("launches", "syncs"), count_calls(step, device))) if device.startswith("cuda") else {}


def _added_bytes(shape: Shape, variant: Variant, common: dict[str, Any]) -> float:
    """Least bytes the statistics add to the step: each side of every block read once, at two bytes per element."""
    tokens, rank = common["batch"] * common["length"], common["rank"]
    per_token = 0
    for p, q in shape.modules(common["targets"]).values():
        per_token += 2 * rank if variant.space == "core" else (rank + q) + (p + rank)
    return 2.0 * tokens * per_token


def train_adapters(model: Any) -> None:
    """Gradients for the adapters' own weights."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
