"""PEFT's own `add_weighted_adapter`, called as it is on the session's model."""

from __future__ import annotations

from functools import partial

import torch

from ..errors import AdapterError
from ..io.adapters import Adapter, LoraTerm
from ..session import SAFETY, TASK
from .base import Inputs, Method, with_task
from .task_arithmetic import ALPHAS

_NAME = "peft_weighted"


def _merge(kind: str, inputs: Inputs, strength: float) -> Adapter:
    session = inputs.require().session
    if session.task is None:
        raise AdapterError("PEFT's weighted adapters combine two adapters: give a task adapter")
    if session.safety.fan_in_fan_out:
        raise AdapterError("PEFT's svd is not called for fan_in_fan_out layers: it factors the transposed ΔW there")
    if not strength:
        return with_task(inputs, inputs.safety, 0.0)
    ranks = [max(t.rank for t in a.terms.values()) for a in (session.task, session.safety)]
    options = {} if kind == "svd" else {"density": 0.5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.seed)
        session.model.add_weighted_adapter(
            [TASK, SAFETY],
            [1.0, strength],
            _NAME,
            combination_type=kind,
            svd_rank=inputs.rank or sum(ranks),
            svd_full_matrices=False,
            **options,
        )
    try:
        terms = {}
        for path, layer in session.model.get_base_model().named_modules():
            if _NAME in getattr(layer, "lora_A", {}):
                a, b = (getattr(layer, side)[_NAME].weight.detach().cpu().clone() for side in ("lora_A", "lora_B"))
                terms[path] = LoraTerm(a, b, float(layer.scaling[_NAME]))
        return Adapter(terms, base_model=session.safety.base_model)
    finally:
        session.model.delete_adapter(_NAME)


METHODS = [
    Method(f"peft-{kind.replace('_', '-')}", f'PEFT add_weighted_adapter("{kind}")', "rank r_task + r_safety" + ("" if kind == "svd" else ", density 0.5"), "weight of safety", ALPHAS, partial(_merge, kind), ("model",))
    for kind in ("svd", "dare_linear_svd", "ties_svd")
]  # fmt: skip
