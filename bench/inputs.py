"""The input pass of a merge (`input_moments`) beside a plain forward pass and a training step, and the solve of its filter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

import sst_kernels as sst
from bench import estimates, gates
from bench.common import Ceilings, Recorder, Turn, free, in_turn, measure, peak_mib
from bench.passes import Pass, train_adapters
from bench.shapes import Shape
from bench.workload import build_model, token_batch

MU = 3.0  # what recipes weigh benign inputs with
WHOLE_UP_TO = 2048  # widest input whose [d, d] moments are solved here: recipes sketch wider ones


def name_of(columns: int | None) -> str:
    return "whole" if columns is None else f"sketch l={columns}"


class Forward:
    """A forward pass as the input pass runs it: no gradients, no labels, logits of the last token alone."""

    def __init__(self, model: Any, batch: dict[str, torch.Tensor]):
        self.model, self.batch = model, {k: v for k, v in batch.items() if k != "labels"}

    @torch.no_grad()
    def __call__(self) -> None:
        self.model(**self.batch, logits_to_keep=1, use_cache=False)


def input_passes(
    shape: Shape,
    record: Recorder,
    ceilings: Ceilings,
    *,
    rank: int,
    targets: str,
    batch: int,
    length: int,
    columns: int,
    device: str,
    dtype: torch.dtype,
    repeats: int = 5,
) -> dict[str, float]:
    """Rows of one model: a batch with sketches of `columns` columns, and with whole [d, d] moments; returns ms per variant."""
    error = gates.inputs_gate(device)
    model = build_model(shape, rank=rank, targets=targets, length=length, device=device, dtype=dtype)
    model.requires_grad_(False)
    tokens = token_batch(shape, batch, length, device)
    forward = Forward(model, tokens)
    kinds = {name_of(kept): kept for kept in (columns, None)}
    passes = {name: sst.input_moments(model, "safety", rank=kept) for name, kept in kinds.items()}
    turns: dict[str, Turn] = {"forward": (forward, nullcontext)}
    turns |= {name: (forward, lambda moments=moments: moments) for name, moments in passes.items()}
    turns["training step"] = (Pass(model, tokens), lambda: _training(model))
    timed = in_turn(turns, device, repeats)
    common = {"batch": batch, "length": length, "rank": rank, "targets": targets}
    plain, bare = timed["forward"].median, peak_mib(forward, device)
    flops = {
        "forward": shape.forward_flops(batch, length, rank, targets),
        "training step": shape.step_flops(batch, length, rank, targets),
    }
    for name, work in flops.items():
        ratio = timed[name].median / plain
        record("inputs", name, timed[name], **common, flops=work, floor_ms=ceilings.floor_ms(flops=work), ratio=ratio)
    for name, moments in passes.items():
        with moments:
            peak = peak_mib(forward, device)
        work = batch * length * estimates.input_flops(shape, kinds[name], targets)
        moved = estimates.input_traffic(shape, kinds[name], batch * length, dtype.itemsize, targets)
        record(
            "inputs", name, timed[name], **common, plain_ms=plain, ratio=timed[name].median / plain, error=error,
            state_bytes=moments.nbytes, above_plain_mib=peak - bare, flops=work, bytes=moved,
            floor_ms=ceilings.floor_ms(moved, work),
        )  # fmt: skip
    return {name: measured.median for name, measured in timed.items()}


def input_filters(
    shape: Shape,
    record: Recorder,
    *,
    rank: int,
    targets: str,
    columns: int,
    device: str,
    dtype: torch.dtype,
    repeats: int = 3,
) -> dict[str, float]:
    """`filter_inputs` on the modules of one layer, times the number of layers; returns ms per variant, all modules."""
    part = shape.with_layers(1)
    model = build_model(part, rank=rank, targets=targets, length=64, device=device, dtype=dtype).requires_grad_(False)
    totals = {}
    for kept in (columns, None):
        name, widest = name_of(kept), max(q for _, q in part.modules(targets).values())
        if kept is None and widest > WHOLE_UP_TO:
            record("inputs", f"filter_inputs, {name}", rank=rank, targets=targets, basis="skipped",
                   note=f"inputs of width {widest}: recipes sketch them")  # fmt: skip
            continue
        sides = []
        for seed in (1, 2):
            with sst.input_moments(model, "safety", rank=kept) as moments:
                Forward(model, token_batch(part, 4, 64, device, seed=seed))()
            sides.append(moments)
        solve = lambda: sst.filter_inputs(*sides, MU)  # noqa: B023, E731
        solved, peak = measure(solve, device, repeats=repeats), peak_mib(solve, device)
        totals[name] = solved.median * shape.layers
        record(
            "inputs", f"filter_inputs, {name}", solved, ms=totals[name], iqr_ms="", rank=rank, targets=targets,
            basis="scaled", state_bytes=2 * estimates.input_bytes(shape, kept, targets), peak_mib=peak,
            note=f"one of {shape.layers} layers, scaled",
        )  # fmt: skip
        free(device)
    return totals


@contextmanager
def _training(model: Any) -> Iterator[None]:
    train_adapters(model)
    yield
    model.requires_grad_(False)
