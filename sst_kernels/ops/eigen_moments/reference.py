"""Definition: Σ_n (U_Lᵀ G_n U_R)² (elementwise), G_n = scale_n · Σ_{t in span n} left_t right_tᵀ."""


def eigen_moments(left, right, spans, scale, u_left, u_right):
    out = left.new_zeros(u_left.shape[1], u_right.shape[1]).double()
    for n, (begin, end) in enumerate(spans.tolist()):
        s = 1.0 if scale is None else scale[n].double()
        G = s * left[begin:end].double().T @ right[begin:end].double()
        out += (u_left.double().T @ G @ u_right.double()) ** 2
    return out
