"""The Fisher structures, by name."""

from __future__ import annotations

from typing import Any

import torch

from sst_kernels.fisher.base import Structure
from sst_kernels.fisher.structures.diagonal import Diagonal
from sst_kernels.fisher.structures.eigen_kronecker import EigenKronecker
from sst_kernels.fisher.structures.full import Full
from sst_kernels.fisher.structures.kronecker import Kronecker
from sst_kernels.fisher.structures.kronecker_lowrank import KroneckerLowRank
from sst_kernels.fisher.structures.kronecker_svd import KroneckerSVD
from sst_kernels.fisher.structures.lowrank import LowRank
from sst_kernels.fisher.structures.rows import RowBuffer
from sst_kernels.fisher.structures.vila import Vila

STRUCTURES: dict[str, type[Structure]] = {
    cls.kind: cls for cls in (Full, Diagonal, Kronecker, KroneckerLowRank, EigenKronecker, KroneckerSVD, LowRank, Vila)
}


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
    that the structure does not have.

    Example:
        >>> from sst_kernels.fisher import STRUCTURES, make_structure
        >>> sorted(STRUCTURES)[:4]
        ['diagonal', 'eigen_kronecker', 'full', 'kronecker']
        >>> make_structure("lowrank", (8, 8), rank=16).kind
        'lowrank'
    """
    if kind not in STRUCTURES:
        raise ValueError(f"structure: expected one of {sorted(STRUCTURES)}, got {kind!r}")
    return STRUCTURES[kind](shape, device=device, sample=sample, count=count, **options)


__all__ = [
    "STRUCTURES",
    "Diagonal",
    "EigenKronecker",
    "Full",
    "Kronecker",
    "KroneckerLowRank",
    "KroneckerSVD",
    "LowRank",
    "RowBuffer",
    "Vila",
    "make_structure",
]
