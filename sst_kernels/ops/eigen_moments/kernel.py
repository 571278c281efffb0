"""Composed of the other kernels: the rotated gradient is itself a sum of outer products.

U_Lᵀ G_n U_R = Σ_i u_i h_niᵀ with u_i the rows of U_L and h_ni those of G_n U_R: p pseudo-tokens per sample, whose
squares `factor_moments` sums in registers. Only G_n and G_n U_R are stored, N·p·q numbers, p the narrow side.
"""

from __future__ import annotations

import torch

from sst_kernels.ops.eigen_moments.op import rotates_tokens
from sst_kernels.ops.factor_moments.kernel import factor_moments
from sst_kernels.ops.factor_rows.kernel import factor_rows
from sst_kernels.ops.sketch.kernel import project


def eigen_moments(left, right, spans, scale, u_left, u_right, out, precision):
    S, N, p, q = left.shape[0], len(spans), left.shape[1], right.shape[1]
    if rotates_tokens(S, N, p, q):
        left, right = project(left, u_left, precision), project(right, u_right, precision)
        factor_moments(left, right, spans, scale, None, out, precision)
        return
    narrow_left = p <= q
    if not narrow_left:
        left, right, p, q = right, left, q, p
    rows = torch.empty(N, p * q, dtype=torch.float32, device=left.device)
    factor_rows(left, right, spans, scale, rows, precision)
    u_narrow, u_wide = (u_left, u_right) if narrow_left else (u_right, u_left)
    h = project(rows.view(N * p, q), u_wide, precision)
    u = u_narrow.repeat(N, 1)
    begin = torch.arange(N, device=left.device, dtype=torch.int64) * p
    pseudo = torch.stack([begin, begin + p], 1)
    factor_moments(*((u, h) if narrow_left else (h, u)), pseudo, None, None, out, precision)
