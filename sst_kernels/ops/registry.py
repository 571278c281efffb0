"""How an op becomes one of torch's: seen by its compiler, its profiler and fake tensors, for 2 µs a call.

`torch.library.custom_op` wraps a call in Python autograd code, which costs ten times as much; nothing here is differentiated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

_library = torch.library.Library("sst_kernels", "DEF")


def register(schema: str, cpu: Callable[..., None]) -> Callable[..., None]:
    """The op of this schema, `name(arguments) -> ()`. On a CPU it runs `cpu`, on a GPU the function of its name in
    `sst_kernels.ops.<name>.kernel`, imported at the first call: both with the arguments of the schema."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    packet = getattr(torch.ops.sst_kernels, name)
    written = [i for i, a in enumerate(packet.default._schema.arguments) if a.alias_info and a.alias_info.is_write]

    @torch.no_grad()
    def cuda(*args) -> None:
        getattr(importlib.import_module(f"sst_kernels.ops.{name}.kernel"), name)(*args)
        # Kernels write behind torch's back; whoever keeps a tensor's version (autograd, `Memo`) must hear of it.
        torch.autograd.graph.increment_version([args[i] for i in written if args[i] is not None])

    _library.impl(name, torch.no_grad()(cpu), "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"sst_kernels::{name}", lambda *args: None, lib=_library)
    return packet.default
