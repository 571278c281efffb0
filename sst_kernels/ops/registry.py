"""How an op becomes one of torch's: seen by its compiler and by fake tensors, without a cost to those who call it eagerly.

`torch.library.custom_op` wraps every call in Python autograd code, 20 µs of it, for ops that are never differentiated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

_library = torch.library.Library("sst_kernels", "DEF")


def register(schema: str, cpu: Callable[..., None]) -> Callable[..., None]:
    """A function of the arguments of this schema, `name(arguments) -> ()`: the op of that name.

    On a CPU it runs `cpu`, on a GPU the function of its name in `sst_kernels.ops.<name>.kernel`, imported at the first call. Autocast
    has no say in either.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.sst_kernels, name).default
    arguments = op._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    out = next(i for i in written if str(arguments[i].type) == "Tensor")

    def cuda(*args) -> None:
        getattr(importlib.import_module(f"sst_kernels.ops.{name}.kernel"), name)(*args)

    def exact(*args) -> None:
        """`cpu`, whose products torch.autocast would round."""
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                cpu(*args)
        else:
            cpu(*args)

    def unseen(form: Callable[..., None], *args) -> None:
        """Run a form below autograd, and tell those who go by a tensor's version (autograd, `Memo`) what it wrote."""
        with torch._C._AutoDispatchBelowAutograd():
            form(*args)
        for i in written:
            if args[i] is not None:
                torch.autograd.graph.increment_version(args[i])

    def call(*args) -> None:
        if type(args[out]) is Tensor and args[out].is_cpu and not torch.compiler.is_compiling():
            with torch._C._AutoDispatchBelowAutograd():  # in which torch's own operations still count versions
                exact(*args)
        else:
            op(*args)

    _library.impl(name, partial(unseen, exact), "CPU")
    _library.impl(name, partial(unseen, cuda), "CUDA")
    torch.library.register_fake(f"sst_kernels::{name}", lambda *args: None, lib=_library)
    return call
