"""Every merging method behind one interface: `METHODS[name].merge(inputs, strength) -> Adapter`."""

from __future__ import annotations

import difflib

from ..errors import RecipeError
from . import inputs, layers, masks, peft_svd, projection, regmean, sparse, spectral, sst, task_arithmetic
from .base import Inputs, Method

METHODS: dict[str, Method] = {
    method.name: method
    for module in (task_arithmetic, sst, layers, masks, regmean, inputs, projection, sparse, spectral, peft_svd)
    for method in module.METHODS
}

__all__ = ["METHODS", "Inputs", "Method", "find"]


def find(name: str) -> Method:
    """The method of that name. Raises RecipeError with the nearest one."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name.lower(), METHODS, n=1, cutoff=0.4)
    raise RecipeError(
        f"unknown method {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(METHODS)}")
    )
