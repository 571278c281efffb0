"""Definition: FΩ above ΩᵀFΩ, F = Σ_n scale_n² Σ_{t in span n} x_t x_tᵀ; all tokens when spans is None. Nothing is rounded."""

import torch


def sketch(x, omega, spans=None, scale=None):
    x, omega = x.double(), omega.double()
    if spans is None:
        product = x.T @ (x @ omega)
    else:
        product = x.new_zeros(omega.shape)
        for n, (begin, end) in enumerate(spans.tolist()):
            s = 1.0 if scale is None else scale[n].double()
            product += s * s * x[begin:end].T @ (x[begin:end] @ omega)
    return torch.cat([product, omega.T @ product])
