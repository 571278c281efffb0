"""TIES, DARE and magnitude pruning on the dense ΔW of every module, through `peft.utils.merge_utils`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..io.adapters import Adapter
from .base import Inputs, Method, densely
from .task_arithmetic import ALPHAS

DENSITY = 0.5


def _merge(rule: str, density: float, inputs: Inputs, strength: float) -> Adapter:
    from peft.utils import merge_utils

    merge: Callable[..., Tensor] = getattr(merge_utils, rule)

    def weighted(pair: list[Tensor]) -> Tensor:
        return merge(pair, torch.tensor([1.0, strength], dtype=torch.float64), density)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inputs.seed)
        return densely(inputs, weighted)


def _only_safety(inputs: Inputs, strength: float) -> Adapter:
    from peft.utils.merge_utils import prune

    return densely(inputs, lambda pair: pair[0] + strength * prune(pair[1], 0.1, method="magnitude"))


def _method(name: str, rule: str, source: str, variant: str) -> Method:
    return Method(
        name,
        source,
        f"{variant}, dense ΔW, density {DENSITY}",
        "weight of safety",
        ALPHAS,
        partial(_merge, rule, DENSITY),
    )


METHODS = [
    _method("ties", "ties", "arXiv:2306.01708", "PEFT's TIES, sign by total"),
    _method("dare-linear", "dare_linear", "arXiv:2311.03099", "drop and rescale, then add"),
    _method("dare-ties", "dare_ties", "arXiv:2311.03099", "drop and rescale, then TIES without trimming"),
    _method("magnitude", "magnitude_prune", "PEFT magnitude_prune", "largest entries of both, then add"),
    Method(
        "safety-arithmetic", "arXiv:2406.11801", "harm-direction removal with the safety adapter as the negative harm vector: its "
        "largest 10 % of entries; no in-context step", "weight of safety", ALPHAS, _only_safety,
    ),
]  # fmt: skip
