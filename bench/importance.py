"""What measuring weight importance costs: over all targeted weights (FILA) and over the LoRA pair (VILA,
2508.21300), both with the same accumulator, and the former also with its accumulator on the host.

The 100x (memory) and 40x (time) of the literature compare different accumulators; these rows keep everything else equal.
"""

from __future__ import annotations

from typing import Any

import torch

import sst_kernels as sst
from bench.common import Recorder, free, measure
from bench.passes import Pass
from bench.shapes import Shape
from bench.workload import build_model, token_batch


class Squares:
    """A training step followed by acc += grad² for chosen parameters, as the public code of both does per batch."""

    def __init__(self, model: Any, batch: dict[str, torch.Tensor], wanted: dict[str, torch.nn.Parameter], where: str):
        self.model, self.batch, self.wanted = model, batch, wanted
        model.requires_grad_(False)
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        self.sums = {n: torch.zeros(p.shape, dtype=torch.float32, device=where) for n, p in wanted.items()}

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        for name, parameter in self.wanted.items():
            self.sums[name] += parameter.grad.to(self.sums[name].device).float().square_()
            parameter.grad = None

    @property
    def nbytes(self) -> int:
        return sum(4 * s.numel() for s in self.sums.values())


def importance_passes(
    shape: Shape,
    record: Recorder,
    *,
    rank: int,
    batch: int,
    length: int,
    layers: int,
    device: str,
    dtype: torch.dtype,
    repeats: int,
) -> None:
    """One batch of each importance pass on the first `layers` layers' worth of the model."""
    part = shape.with_layers(min(layers, shape.layers))
    model = build_model(part, rank=rank, length=length, device=device, dtype=dtype)
    tokens = token_batch(part, batch, length, device)
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    full = {n: p for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    about = {"rank": rank, "batch": batch, "length": length, "note": f"{part.layers} of {shape.layers} layers"}

    def one(name: str, wanted: dict[str, torch.nn.Parameter], where: str, reference: float | None) -> float:
        step = Squares(model, tokens, wanted, where)
        timed = measure(step, device, repeats=repeats)
        state = step.nbytes * shape.layers // part.layers
        ratio = None if reference is None else timed.median / reference
        record("importance", name, timed, **about, state_bytes=state, ratio=ratio, plain_ms=reference)
        return timed.median

    vila = one("LoRA pair, batch gradients squared (VILA)", lora, device, None)
    free(device)
    one("all targeted weights, same accumulator (FILA)", full, device, vila)
    free(device)
    if device.startswith("cuda"):
        one("all targeted weights, accumulator on the host", full, "cpu", vila)
        free(device)
    model.requires_grad_(False)
    for parameter in lora.values():
        parameter.requires_grad_(True)
    with sst.fisher_accumulate(model, "safety", space="factor", structure="vila") as accumulator:
        timed = measure(Pass(model, tokens), device, repeats=repeats)
    state = accumulator.fisher.nbytes * shape.layers // part.layers
    record(
        "importance", "LoRA pair, per-sample variance (factor/vila)", timed, **about,
        state_bytes=state, ratio=timed.median / vila, plain_ms=vila,
    )  # fmt: skip
