"""Definition: Y = F Ω with F = Σ_n scale_n² Σ_{t in span n} x_t x_tᵀ; all tokens when spans is None."""


def sketch(x, omega, spans=None, scale=None):
    x, omega = x.double(), omega.double()
    if spans is None:
        return x.T @ (x @ omega)
    out = x.new_zeros(omega.shape)
    for n, (begin, end) in enumerate(spans.tolist()):
        s = 1.0 if scale is None else scale[n].double()
        out += s * s * x[begin:end].T @ (x[begin:end] @ omega)
    return out
