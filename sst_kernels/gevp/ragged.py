"""Lists of pencils of different orders: those that fit together are stacked and solved as one batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from sst_kernels.gevp.operators import Operator, Stack
from sst_kernels.gevp.result import GEVPResult

Side = Sequence[Tensor | Operator]


def solve_list(
    solve: Callable[[Tensor | Operator, Tensor | Operator], GEVPResult], A: Side, B: Side
) -> list[GEVPResult]:
    """The results of solve(A[i], B[i]) in order.

    Pencils of matrices that agree in order, dtypes and device are stacked (which copies them) and solved in one call; operators are
    solved one at a time. A stacked problem gives the bits it gives alone by the same route.

    Raises:
        TypeError: one side is a list and the other is not.
        ValueError: the lists differ in length, or an entry is a batch itself.
    """
    if not isinstance(A, Sequence) or not isinstance(B, Sequence):
        raise TypeError(f"A and B must both be lists of pencils or neither, got {type(A).__name__}, {type(B).__name__}")
    if len(A) != len(B):
        raise ValueError(f"A has {len(A)} matrices, B {len(B)}; they are paired in order")
    groups: dict[object, list[int]] = defaultdict(list)
    for index, (a, b) in enumerate(zip(A, B)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            groups[index].append(index)
        elif a.ndim != 2 or b.ndim != 2:
            raise ValueError(
                f"pencil {index} is {tuple(a.shape)}, {tuple(b.shape)}; a list holds single matrices [n, n]"
            )
        else:
            groups[a.shape, b.shape, a.dtype, b.dtype, a.device, b.device].append(index)
    results: dict[int, GEVPResult] = {}
    for members in groups.values():
        if len(members) == 1:
            results[members[0]] = solve(A[members[0]], B[members[0]])
            continue
        together = solve(*(Stack([cast(Tensor, side[index]) for index in members]) for side in (A, B)))
        results.update(zip(members, together))
    return [results[index] for index in range(len(A))]
