"""Definition: Σ_n G_n and Σ_n G_n² (elementwise), G_n = scale_n · Σ_{t in span n} left_t right_tᵀ."""


def factor_moments(left, right, spans, scale=None):
    total = square = left.new_zeros(left.shape[1], right.shape[1]).double()
    for n, (begin, end) in enumerate(spans.tolist()):
        s = 1.0 if scale is None else scale[n].double()
        G = s * left[begin:end].double().T @ right[begin:end].double()
        total, square = total + G, square + G * G
    return total, square
