// Cholesky factor and its inverse at once, in place, on one block W (lower triangle, row-major in shared memory): the
// elimination that turns A into the identity turns the identity into L^-1, and a column of A is done with exactly when the
// same column of L^-1 begins. Step j, two phases with a barrier after each:
//   phase 1, one thread an index i:   r_i = w_ji / d (i < j),  1 / d (i = j),  w_ij / d (i > j),  with d = sqrt(w_jj);
//   phase 2, one thread an entry:     w_jc = r_c (c <= j);  w_ic = w_ic - r_i r_c (j < i, c <= i), w_ij counting as zero.
// After the last step W = L^-1.
#pragma once

#include <cmath>

#include "sst/views.h"

namespace sst::cuda::cholesky {

template <class T>
SST_HD inline T pivot_row(const T* w, int ld, int j, int i, T root) {
    return i == j ? T(1) / root : (i < j ? w[j * ld + i] : w[i * ld + j]) / root;
}

template <class T>
SST_HD inline void eliminate(T* w, int ld, const T* r, int j, int i, int c) {
    if (i < j || c > i) return;
    T& entry = w[i * ld + c];
    if (i == j)
        entry = r[c];
    else
        entry = (c == j ? T(0) : entry) - r[i] * r[c];
}

}  // namespace sst::cuda::cholesky
