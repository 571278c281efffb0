"""Second moments of per-sample gradients in Kronecker eigenbases."""

from __future__ import annotations

import torch
from torch import Tensor

from sst_kernels.ops import checks
from sst_kernels.ops.registry import register
from sst_kernels.ops.spans import add_weighted, layout, products


def eigen_moments(
    left: Tensor,
    right: Tensor,
    spans: Tensor,
    scale: Tensor | None,
    u_left: Tensor,
    u_right: Tensor,
    out: Tensor,
    *,
    precision: str = "tf32x3",
) -> Tensor:
    """Add Σ_n (U_Lᵀ G_n U_R)² to `out` in place, G_n = scale_n Σ_{t in span n} left_t right_tᵀ.

    left [S, p], right [S, q]: float32, bfloat16 or float16; spans [N, 2] int64; scale [N] float32 or None; u_left
    [p, p'], u_right [q, q'] float32, any number of columns; out [p', q'] float32.
    The cheaper order is taken, by `rotates_tokens`: rotate G_n (N·min(p, q) rows) or rotate the tokens (S rows).
    `precision` says how float32 products are formed on tensor cores: "tf32x3" (float32 accuracy), "ieee" or "tf32".

    Raises ValueError when a shape, dtype or device does not fit.

    Example:
        >>> from sst_kernels.ops import eigen_moments
        >>> spans = torch.tensor([[0, 3], [3, 5]])
        >>> eigen_moments(torch.ones(5, 2), torch.ones(5, 2), spans, None, torch.eye(2), torch.eye(2), torch.zeros(2, 2))
        tensor([[13., 13.],
                [13., 13.]])
    """
    checks.tokens("left", left)
    checks.tokens("right", right, left.shape[0])
    checks.spans_and_scale(left, spans, scale)
    for name, u, x in (("u_left", u_left, left), ("u_right", u_right, right)):
        if u.ndim != 2 or u.shape[0] != x.shape[1] or u.dtype != torch.float32 or u.device != x.device:
            raise ValueError(
                f"{name}: expected [{x.shape[1]}, ·] float32 on {x.device}, got {list(u.shape)} {u.dtype} on {u.device}"
            )
    checks.accumulator("out", out, (u_left.shape[1], u_right.shape[1]), left)
    checks.precision(precision)
    if len(spans) and out.numel():
        _eigen_moments(left, right, spans, scale, u_left, u_right, out, precision)
    return out


def rotates_tokens(S: int, N: int, p: int, q: int) -> bool:
    """Whether rotating S token rows costs less than rotating the N·min(p, q) rows of the per-sample gradients."""
    return N * min(p, q) > S


def _cpu(left, right, spans, scale, u_left, u_right, out, precision):
    left, right = left.float(), right.float()
    if rotates_tokens(left.shape[0], len(spans), left.shape[1], right.shape[1]):
        torch.ops.sst_kernels.factor_moments(left @ u_left, right @ u_right, spans, scale, None, out, precision)
        return
    # The tokens of the narrow side are rotated, which is cheap, and by the wide side the gradients.
    if left.shape[1] > right.shape[1]:
        left, right, u_left, u_right, out = right, left, u_right, u_left, out.T
    left = left @ u_left
    runs = layout(len(left), spans, scale).runs
    pieces = [piece for run in runs for piece in run.pieces(left.shape[1] * right.shape[1])]
    batch = out if len(pieces) == 1 else torch.zeros_like(out)  # added to those of all with one rounding
    for piece in pieces:
        G = products(piece, left, right)
        m, p, q = G.shape
        G = torch.mm(G.view(m * p, q), u_right)
        if m == 1:
            batch.addcmul_(G, G, value=piece.scale**2)
        else:
            add_weighted(batch, piece.squares, G.square_().view(m, -1))
    if batch is not out:
        out += batch


_eigen_moments = register(
    "eigen_moments(Tensor left, Tensor right, Tensor spans, Tensor? scale, Tensor u_left, Tensor u_right,"
    " Tensor(a!) out, str precision) -> ()",
    _cpu,
)
