"""Definition: row n holds vec(G_n), G_n = scale_n · Σ_{t in span n} left_t right_tᵀ, row-major."""

import torch


def factor_rows(left, right, spans, scale=None):
    rows = []
    for n, (begin, end) in enumerate(spans.tolist()):
        s = 1.0 if scale is None else scale[n].double()
        rows.append((s * left[begin:end].double().T @ right[begin:end].double()).flatten())
    return torch.stack(rows)
