"""Definition: row n holds vec(scale_n · Σ_{t in span n} left_t right_tᵀ) of every module, side by side, row-major."""

import torch


def core_outer(lefts, rights, spans, scale=None):
    rows = []
    for n, (begin, end) in enumerate(spans.tolist()):
        s = 1.0 if scale is None else scale[n].double()
        G = [s * left[begin:end].double().T @ right[begin:end].double() for left, right in zip(lefts, rights)]
        rows.append(torch.cat([g.flatten() for g in G]))
    return torch.stack(rows)
