"""The processes of a run: one alone, or the ranks of torchrun and accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def world() -> Any:
    """The group of all ranks under torchrun or accelerate; None in a single process."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def leader() -> bool:
    """Whether this process writes the outputs: the first rank, or the only process."""
    return world() is None or dist.get_rank() == 0


@contextmanager
def ranks() -> Iterator[None]:
    """Under torchrun or accelerate (WORLD_SIZE > 1): a process group for the block, NCCL with a GPU per rank, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
