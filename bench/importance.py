"""What measuring weight importance costs: over all weights (FILA) and over the LoRA pair (VILA, 2508.21300), one batch of one side.

Twice: with one accumulator for both, which leaves only what the methods need; and as the public code of both does it
(github.com/kyj93790/VILA, TOFU/fila.py and TOFU/vila.py), with its sums on the host and on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

import sst_kernels as sst
from bench.common import Recorder, in_turn, peak_mib
from bench.passes import Pass
from bench.shapes import Shape
from bench.workload import build_model, token_batch

VILA, FILA = "LoRA pair, batch gradients squared (VILA)", "all targeted weights, same accumulator (FILA)"
Weights = dict[str, torch.nn.Parameter]


class Squares:
    """A training step followed by acc += grad² in float32 for the weights of `wanted`."""

    def __init__(self, model: Any, batch: dict[str, torch.Tensor], wanted: Weights, where: str):
        self.model, self.batch, self.wanted = model, batch, wanted
        self.trained = wanted
        self.sums = {n: torch.zeros(p.shape, dtype=torch.float32, device=where) for n, p in wanted.items()}

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        for name, parameter in self.wanted.items():
            self.sums[name] += parameter.grad.to(self.sums[name].device).float().square_()
            parameter.grad = None

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.sums.values())


class PublicLoop:
    """One batch of the public loops: sums in the model's dtype, weighted by the number of labels, every product a new tensor.

    FILA's differentiates every parameter of the bare model and sums grad² of its linear maps; VILA's differentiates the LoRA pair and
    sums grad and grad².
    """

    def __init__(self, model: Any, batch: dict[str, torch.Tensor], wanted: Weights, where: str, *, centred: bool):
        self.model, self.batch, self.where = model, batch, where
        self.trained = wanted if centred else dict(model.named_parameters())
        zeros = lambda: {n: torch.zeros(p.shape, dtype=p.dtype, device=where) for n, p in wanted.items()}  # noqa: E731
        self.squares, self.means = zeros(), zeros() if centred else {}

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        count = (self.batch["labels"] != -100).sum()
        for name, parameter in self.model.named_parameters():
            if name in self.means:
                self.means[name] += (parameter.grad * count).detach().to(self.where)
            if name in self.squares:
                self.squares[name] += (parameter.grad.pow(2) * count).detach().to(self.where)
            parameter.grad = None

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for sums in (self.squares, self.means) for s in sums.values())


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
    """One batch of each importance pass, in turn, on the first `layers` layers' worth of the model."""
    part = shape.with_layers(min(layers, shape.layers))
    model = build_model(part, rank=rank, length=length, device=device, dtype=dtype)
    bare = build_model(part, rank=rank, length=length, device=device, dtype=dtype).unload()
    tokens = token_batch(part, batch, length, device)
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    full = {n: p for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    linear = {n: p for n, p in bare.named_parameters() if n.endswith("proj.weight")}
    accumulator = sst.fisher_accumulate(model, "safety", space="factor", structure="vila")
    variance = Pass(model, tokens)
    steps: dict[str, Any] = {VILA: Squares(model, tokens, lora, device), FILA: Squares(model, tokens, full, device)}
    for where, home in {"host": "cpu", "GPU": device}.items() if device.startswith("cuda") else [("host", "cpu")]:
        steps[f"public loop of VILA, sums on the {where}"] = PublicLoop(model, tokens, lora, home, centred=True)
        steps[f"public loop of FILA, sums on the {where}"] = PublicLoop(bare, tokens, linear, home, centred=False)
    turns = {name: (step, lambda step=step: _trained(step.model, step.trained)) for name, step in steps.items()}
    ours = "LoRA pair, per-sample variance (factor/vila)"
    turns[ours] = (variance, lambda: _trained(model, lora, accumulator))
    timed = in_turn(turns, device, repeats)
    about = {"rank": rank, "batch": batch, "length": length, "note": f"{part.layers} of {shape.layers} layers"}
    vila = timed[VILA].median
    for name, (run, context) in turns.items():
        with context():
            peak = peak_mib(run, device)
        state = accumulator.fisher.nbytes if name == ours else steps[name].nbytes
        record(
            "importance", name, timed[name], **about, state_bytes=state * shape.layers // part.layers, peak_mib=peak,
            ratio=None if name == VILA else timed[name].median / vila, plain_ms=None if name == VILA else vila,
        )  # fmt: skip


@contextmanager
def _trained(model: Any, weights: Weights, hooked: AbstractContextManager | None = None) -> Iterator[None]:
    """Gradients for these weights alone."""
    model.requires_grad_(False)
    for parameter in weights.values():
        parameter.requires_grad_(True)
    with ExitStack() as stack:
        if hooked is not None:
            stack.enter_context(hooked)
        yield
