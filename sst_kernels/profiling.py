"""Named ranges around the stages, for whichever profiler looks: torch.profiler everywhere, NVTX (nsys, ncu) on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A range called `sst.<name>`; as a context manager or a decorator. Costs a microsecond when nobody looks."""
    on_gpu = torch.cuda.is_initialized()
    if not on_gpu and not torch.autograd._profiler_enabled():
        yield
        return
    if on_gpu:
        torch.cuda.nvtx.range_push(f"sst.{name}")
    try:
        with torch.autograd.profiler.record_function(f"sst.{name}"):
            yield
    finally:
        if on_gpu:
            torch.cuda.nvtx.range_pop()
