// BLAS and LAPACK as a table of function pointers. The Python binding fills it from SciPy's cython_blas / cython_lapack
// capsules, a C++ test from whatever library it links: no BLAS is linked into the module.
#pragma once

namespace sst::cpu {

struct Lapack {
    using Gemm = void(char*, char*, int*, int*, int*, double*, double*, int*, double*, int*, double*, double*, int*);
    using Dtrsm = void(char*, char*, char*, char*, int*, int*, double*, double*, int*, double*, int*);
    using Strsm = void(char*, char*, char*, char*, int*, int*, float*, float*, int*, float*, int*);
    using Dpotrf = void(char*, int*, double*, int*, int*);
    using Spotrf = void(char*, int*, float*, int*, int*);
    using Syevd = void(char*, char*, int*, double*, int*, double*, double*, int*, int*, int*, int*);
    using Sygst = void(int*, char*, int*, double*, int*, double*, int*, int*);
    using Sytrd = void(char*, int*, double*, int*, double*, double*, double*, double*, int*, int*);
    using Stemr = void(char*, char*, int*, double*, double*, double*, double*, int*, int*, int*, double*, double*, int*, int*, int*,
                       int*, double*, int*, int*, int*, int*);
    using Stedc = void(char*, int*, double*, double*, double*, int*, double*, int*, int*, int*, int*);
    using Ormtr = void(char*, char*, char*, int*, int*, double*, int*, double*, double*, int*, double*, int*, int*);

    Gemm* dgemm = nullptr;
    Dtrsm* dtrsm = nullptr;
    Strsm* strsm = nullptr;
    Dpotrf* dpotrf = nullptr;
    Spotrf* spotrf = nullptr;
    Syevd* dsyevd = nullptr;
    Sygst* dsygst = nullptr;
    Sytrd* dsytrd = nullptr;
    Stemr* dstemr = nullptr;
    Stedc* dstedc = nullptr;
    Ormtr* dormtr = nullptr;
};

/// The one table of the process, filled before the first solve.
inline Lapack& lapack() {
    static Lapack table;
    return table;
}

}  // namespace sst::cpu
