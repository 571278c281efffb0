"""Fisher passes beside the plain training step they ride on: time, memory, launches, host synchronisations."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

import sst_kernels as sst
from bench.common import Ceilings, Measured, Recorder, count_calls, free, measure
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

    def plain(frozen: bool, *, warmup: int = 1) -> Measured:
        model.requires_grad_(False)
        if not frozen:
            train_adapters(model)
        context = _input_gradients(model) if frozen else nullcontext()
        with context:
            return measure(Pass(model, tokens), device, repeats=repeats, warmup=warmup)

    try:
        first = plain(False, warmup=2)
        record("pass", f"plain{suffix}", first, **plain_columns, **_calls(Pass(model, tokens), device))
        results["plain"] = first.median
        for variant in variants:
            if time_left() < 4e-3 * repeats * first.median + 5:
                record("pass", variant.name + suffix, **common, basis="skipped", note="time budget spent")
                continue
            try:
                results |= _one(variant, model, tokens, plain, record, common, shape, ceilings, device, suffix, repeats)
            except Exception as error:  # one variant that fails must not cost the others
                _failed(record, variant.name + suffix, common, error)
            free(device)
    except torch.OutOfMemoryError as error:
        _failed(record, f"plain{suffix}", common, error)
    return results


def _one(variant, model, tokens, plain, record, common, shape, ceilings, device, suffix, repeats) -> dict[str, float]:
    """One variant between two measurements of the plain step, which cancels drift."""
    before = plain(variant.frozen)
    options = dict(variant.options)
    if variant.layers is not None:
        options["modules"] = "|".join(rf"model\.layers\.{i}\..*" for i in range(variant.layers))
    step = Pass(model, tokens, variant.sampled)
    with sst.fisher_accumulate(
        model, "safety", space=variant.space, structure=variant.structure, **options
    ) as accumulator:
        timed = measure(step, device, repeats=repeats, warmup=2)
        calls = _calls(step, device)
    state, adapted = accumulator.fisher.nbytes, len({block.module for block in accumulator.fisher.blocks.values()})
    after = plain(variant.frozen, warmup=0)
    reference = Measured(before.times + after.times, before.peak_mib)
    modules = len(shape.modules(common["targets"]))
    above = None if timed.peak_mib is None else timed.peak_mib - reference.peak_mib
    note = "" if above is None else f"peak {above:.0f} MiB above plain"
    added, basis = timed.median - reference.median, "measured"
    if adapted < modules:
        note = "; ".join(filter(None, [note, f"{adapted} of {modules} modules measured, overhead scaled"]))
        added, state, basis = added * modules / adapted, int(state * modules / adapted), "scaled"
    extra = _added_bytes(shape, variant, common) if adapted == modules else None
    record(
        "pass",
        variant.name + suffix,
        timed,
        **common,
        ms=reference.median + added,
        ratio=1 + added / reference.median,
        basis=basis,
        state_bytes=state,
        bytes=extra,
        floor_ms=None if extra is None else ceilings.floor_ms(extra),
        **calls,
        above_plain_mib=above,
        plain_ms=reference.median,
        note=note,
    )
    return {variant.name: reference.median + added, f"plain for {variant.name}": reference.median}


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


class _input_gradients:
    """Let a fully frozen model run a backward pass, as a frozen Fisher pass does: gradients start at the embeddings."""

    def __init__(self, model: Any):
        self.embeddings = model.get_input_embeddings()

    def __enter__(self) -> None:
        self.handle = self.embeddings.register_forward_hook(lambda _m, _i, out: out.requires_grad_())

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
