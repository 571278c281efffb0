"""RegMean (Jin et al. 2023, arXiv:2212.09849): least squares on the inputs that each adapter's module sees, and two methods after it.

ΔW = (Σ_i w_i ΔW_i G_i) (Σ_i w_i G_i)⁻¹ with G_i = XᵀX on adapter i's own data. The result has the rank of the sum: with
ΔW_i = c_i B_i A_i it is Σ c_i B_i (w_i A_i G_i G⁻¹), so it stays a LoRA adapter, exactly.

RegMean++ (arXiv:2508.03121) goes from layer to layer: what enters a layer comes out of the layers merged so far, and within it
each adapter's own modules give the G_i. Data-free covariance (arXiv:2604.01329) takes G_i from ΔW_iᵀ ΔW_i.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluate import active
from ..io.adapters import Adapter, LoraTerm
from ..io.data import Dataset, batches
from ..io.fit import attach
from ..merge.source import Source
from ..run.grams import Grams
from ..session import SAFETY, TASK
from .base import Inputs, Method, joined, per_module, weights_of, with_task
from .task_arithmetic import ALPHAS

_LAYER = "regmean"  # name of the merged layer's adapter on the model
OFF_DIAGONAL = 0.9  # the paper's α: off-diagonal entries of the Grams are shrunk by it


def regmean(terms: list[LoraTerm], grams: list[Tensor], weights: list[float]) -> LoraTerm:
    """One module: terms [r_i], grams [d_in, d_in] float64."""
    shrunk = [w * (OFF_DIAGONAL * g + (1 - OFF_DIAGONAL) * torch.diag(g.diagonal())) for g, w in zip(grams, weights)]
    total = sum(shrunk[1:], shrunk[0])
    jitter = torch.finfo(torch.float64).eps * len(total) * total.diagonal().max()
    factor = torch.linalg.cholesky(total + jitter * torch.eye(len(total), dtype=total.dtype))
    parts = [torch.cholesky_solve(g @ t.A.double().T, factor).T for t, g in zip(terms, shrunk)]
    left = torch.cat([t.scaling * t.B.double() for t in terms], 1)
    return LoraTerm(torch.cat(parts).float(), left.float(), 1.0)


def data_free(terms: Sequence[LoraTerm], weights: Sequence[float]) -> LoraTerm:
    """Σ w_i ΔW_i C_i (Σ C_i)⁺ with C_i = w_i² ΔW_iᵀ ΔW_i, in the rows that the adapters span."""
    basis = torch.linalg.qr(torch.cat([t.A.double() for t in terms]).T)[0]  # [d_in, R]
    rows = [t.A.double() @ basis for t in terms]
    left = [w * t.scaling * t.B.double() for t, w in zip(terms, weights)]
    grams = [a.T @ (b.T @ b) @ a for a, b in zip(rows, left)]
    inverse = torch.linalg.pinv(sum(grams[1:], grams[0]), hermitian=True)
    parts = [a @ g @ inverse @ basis.T for a, g in zip(rows, grams)]
    return LoraTerm(torch.cat(parts).float(), torch.cat(left, 1).float(), 1.0)


def _module(inputs: Inputs, name: str, grams: Sequence[Mapping[str, Tensor]], strength: float) -> LoraTerm:
    """One module merged with the Grams of benign and harmful data; scaled alone where one adapter has it."""
    task, safety = (a.terms.get(name) if a is not None else None for a in (inputs.task, inputs.safety))
    if task is not None and safety is not None:
        return regmean([task, safety], [g[name] for g in grams], [1.0, strength])
    if task is not None:
        return task
    assert safety is not None
    return LoraTerm(safety.A, strength * safety.B, safety.scaling)


def _merge(inputs: Inputs, strength: float) -> Adapter:
    if inputs.task is None:
        return with_task(inputs, inputs.safety, strength)
    grams = [inputs.require().grams(side) for side in ("benign", "harm")]
    names = sorted({*inputs.task.terms, *inputs.safety.terms})
    return joined(inputs, {name: _module(inputs, name, grams, strength) for name in names})


class _Walk:
    """One side's data on their way through the decoder's layers: what enters the next one, and what each is called with beside it."""

    def __init__(self, source: Source, data: Dataset, adapter: str, layers: Sequence[nn.Module]):
        self.model, self.adapter = source.session.model, adapter
        self.masks: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self.calls: list[list[tuple[Any, Any]]] = []  # of each batch, of each layer
        device = next(self.model.parameters()).device

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if not self.calls[-1]:
                self.hidden.append(given)
            self.calls[-1].append((rest, kwargs))

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
        try:
            with active(self.model, adapter):
                for batch in batches(data, source.spec.tokens_per_batch):
                    inputs = batch.inputs(device)
                    inputs.pop("labels")
                    self.masks.append(inputs["attention_mask"].bool())
                    self.calls.append([])
                    self.model(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def grams(self, layer: nn.Module, number: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Of the layer's modules, the side's own adapter on in this layer."""
        with Grams(self.model.get_base_model(), names) as grams:
            self._through(layer, number, self.adapter, grams)
        return {name: total[:-1, :-1] for name, total in grams.sums.items()}

    def advance(self, layer: nn.Module, number: int, adapter: str) -> None:
        """Through the layer with another adapter."""
        self.hidden = self._through(layer, number, adapter)

    def _through(self, layer: nn.Module, number: int, adapter: str, grams: Grams | None = None) -> list[Tensor]:
        out = []
        with active(self.model, adapter):
            for hidden, mask, calls in zip(self.hidden, self.masks, self.calls, strict=True):
                if grams is not None:
                    grams.mask = mask
                args, kwargs = calls[number]
                found = layer(hidden, *args, **kwargs)
                out.append(found[0] if isinstance(found, tuple) else found)
        return out


@torch.no_grad()
def _plus(inputs: Inputs, strength: float) -> Adapter:
    if inputs.task is None:
        return with_task(inputs, inputs.safety, strength)
    source = inputs.require()
    outside = [source.grams(side) for side in ("benign", "harm")]  # of modules in no layer, such as the head
    assert source.benign is not None
    assert source.harm is not None
    model, names = source.session.model, sorted({*inputs.task.terms, *inputs.safety.terms})
    places = {name: m[0] for name in names if (m := re.match(r".*?\.\d+(?=\.)", name))}
    modules = dict(model.get_base_model().named_modules())
    layers = [name for name in modules if name in places.values()]
    walks = [
        _Walk(source, data, own, [modules[name] for name in layers])
        for data, own in ((source.benign, TASK), (source.harm, SAFETY))
    ]
    terms = {name: _module(inputs, name, outside, strength) for name in names if name not in places}
    for number, place in enumerate(layers):
        inside = [name for name in names if places.get(name) == place]
        grams = [walk.grams(modules[place], number, inside) for walk in walks]
        own = {name: _module(inputs, name, grams, strength) for name in inside}
        terms |= own
        attach(model, _LAYER, joined(inputs, own))
        try:
            for walk in walks:
                walk.advance(modules[place], number, _LAYER)
        finally:
            model.delete_adapter(_LAYER)
    return joined(inputs, terms)


def _data_free(inputs: Inputs, strength: float) -> Adapter:
    names = {id(t): n for n, t in inputs.safety.terms.items()}

    def rule(terms: list[LoraTerm]) -> LoraTerm:
        return data_free(terms, weights_of(inputs, terms, names.get(id(terms[-1]), ""), strength))

    return per_module(inputs, rule)


_NEEDS = ("harm", "benign", "model")
METHODS = [
    Method("regmean", "arXiv:2212.09849", f"off-diagonal factor {OFF_DIAGONAL}; benign inputs for task, harmful for safety", "weight of the safety data", ALPHAS, _merge, _NEEDS),
    Method("regmean++", "arXiv:2508.03121", f"as regmean; what enters a layer comes out of the merged layers before it, layer after layer; off-diagonal factor {OFF_DIAGONAL}", "weight of the safety data", (0.03, 0.1, 0.3, 1.0), _plus, _NEEDS),
    Method("data-free-covariance", "arXiv:2604.01329, by its abstract", "regmean with ΔWᵀΔW in place of the inputs' XᵀX, unshrunk, in the rows that the adapters span; ΔW of safety times the weight", "weight of safety", ALPHAS, _data_free),
]  # fmt: skip
