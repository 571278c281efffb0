"""Definition: the lower triangle of Σ_n scale_n² Σ_{t in span n} x_t x_tᵀ; all tokens when spans is None."""


def gram(x, spans=None, scale=None):
    x = x.double()
    if spans is None:
        return (x.T @ x).tril()
    out = x.new_zeros(x.shape[1], x.shape[1])
    for n, (begin, end) in enumerate(spans.tolist()):
        s = 1.0 if scale is None else scale[n].double()
        out += s * s * x[begin:end].T @ x[begin:end]
    return out.tril()
