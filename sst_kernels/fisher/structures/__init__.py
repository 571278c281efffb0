"""The Fisher structures, by name."""

from __future__ import annotations

from typing import Any

import torch

from sst_kernels.fisher.base import Structure
from sst_kernels.fisher.structures.full import Full
from sst_kernels.fisher.structures.rows import RowBuffer

STRUCTURES: dict[str, type[Structure]] = {cls.kind: cls for cls in (Full,)}


def make_structure(
    kind: str,
    shape: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    sample: str = "sequence",
    count: str = "sequences",
    **options: Any,
) -> Structure:
    """The structure called `kind` for a block of shape [p, q]. ValueError for an unknown name, TypeError for an option
    that the structure does not have."""
    if kind not in STRUCTURES:
        raise ValueError(f"structure: expected one of {sorted(STRUCTURES)}, got {kind!r}")
    return STRUCTURES[kind](shape, device=device, sample=sample, count=count, **options)


__all__ = ["STRUCTURES", "Full", "RowBuffer", "make_structure"]
