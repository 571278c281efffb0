"""cuSOLVER's own eigensolvers on torch tensors, as peers: a loop over sygvd or sygvdx, and the two batched standard solvers."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_double, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

VECTORS, LOWER, ITYPE, INDEX_RANGE, R_64F = 1, 0, 1, 1002, 1


class CuSolver:
    """One handle on the current stream. All methods take float64 CUDA tensors [batch, n, n] and return (values, vectors).

    Values are [batch, k] descending, vectors [batch, n, k] with v' B v = 1.
    """

    def __init__(self):
        self.library = ctypes.CDLL(_path())
        self.handle, self.parameters, self.jacobi = c_void_p(), c_void_p(), c_void_p()
        self._call("cusolverDnCreate", byref(self.handle))
        stream = torch.cuda.current_stream().cuda_stream
        self._call("cusolverDnSetStream", self.handle, c_void_p(stream))
        self._call("cusolverDnCreateParams", byref(self.parameters))
        self._call("cusolverDnCreateSyevjInfo", byref(self.jacobi))

    def _call(self, name: str, *arguments) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned cuSOLVER status {status}")

    def sygvd(self, a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """All pairs, one problem after the other."""
        n, size = a.shape[-1], c_int()
        a, factor, info = a.clone(), b.clone(), torch.zeros(len(a), dtype=torch.int32, device=a.device)
        values = torch.empty(len(a), n, dtype=a.dtype, device=a.device)
        fixed = (self.handle, c_int(ITYPE), c_int(VECTORS), c_int(LOWER), c_int(n))

        def matrices(p: int):
            return _at(a, p), c_int(n), _at(factor, p), c_int(n)

        self._call("cusolverDnDsygvd_bufferSize", *fixed, *matrices(0), _at(values, 0), byref(size))
        work = torch.empty(size.value, dtype=a.dtype, device=a.device)
        for p in range(len(a)):
            self._call("cusolverDnDsygvd", *fixed, *matrices(p), _at(values, p), _at(work), size, _at(info, p))
        return _top(values, a, k)

    def sygvdx(self, a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest pairs, one problem after the other."""
        n, size, found = a.shape[-1], c_int(), c_int()
        a, factor, info = a.clone(), b.clone(), torch.zeros(len(a), dtype=torch.int32, device=a.device)
        values = torch.empty(len(a), n, dtype=a.dtype, device=a.device)
        fixed = (self.handle, c_int(ITYPE), c_int(VECTORS), c_int(INDEX_RANGE), c_int(LOWER), c_int(n))
        limits = (c_double(0), c_double(0), c_int(n - k + 1), c_int(n))

        def matrices(p: int):
            return _at(a, p), c_int(n), _at(factor, p), c_int(n), *limits, byref(found), _at(values, p)

        self._call("cusolverDnDsygvdx_bufferSize", *fixed, *matrices(0), byref(size))
        work = torch.empty(size.value, dtype=a.dtype, device=a.device)
        for p in range(len(a)):
            self._call("cusolverDnDsygvdx", *fixed, *matrices(p), _at(work), size, _at(info, p))
        return values[:, :k].flip(-1), a[:, :k].flip(1).mT

    def xsygvdx(self, a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest pairs by the 64-bit interface, one problem after the other; cuSOLVER of CUDA 13 and later.

        Raises:
            RuntimeError: this cuSOLVER does not have it.
        """
        if not hasattr(self.library, "cusolverDnXsygvdx"):
            raise RuntimeError(f"cuSOLVER {version()} has no cusolverDnXsygvdx")
        n, found, device, host = a.shape[-1], c_int64(), c_size_t(), c_size_t()
        a, factor, info = a.clone(), b.clone(), torch.zeros(len(a), dtype=torch.int32, device=a.device)
        values = torch.empty(len(a), n, dtype=a.dtype, device=a.device)
        low, high, real = c_double(0), c_double(0), c_int(R_64F)

        def pencil(p: int):
            matrices = (real, _at(a, p), c_int64(n), real, _at(factor, p), c_int64(n))
            limits = (byref(low), byref(high), c_int64(n - k + 1), c_int64(n), byref(found))
            return c_int(LOWER), c_int64(n), *matrices, *limits, real, _at(values, p), real

        kind = (self.handle, self.parameters, c_int(ITYPE), c_int(VECTORS), c_int(INDEX_RANGE))
        self._call("cusolverDnXsygvdx_bufferSize", *kind, *pencil(0), byref(device), byref(host))
        work = torch.zeros(max(device.value, 1), dtype=torch.uint8, device=a.device)
        on_host = ctypes.create_string_buffer(max(host.value, 1))
        for p in range(len(a)):
            self._call("cusolverDnXsygvdx", *kind, *pencil(p), _at(work), device, on_host, host, _at(info, p))
        return values[:, :k].flip(-1), a[:, :k].flip(1).mT

    def xsyev_batched(self, a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """torch's batched Cholesky and triangular solves around cusolverDnXsyevBatched."""
        factor, c = reduce(a, b)
        batch, n = c.shape[0], c.shape[-1]
        values = torch.empty(batch, n, dtype=c.dtype, device=c.device)
        info = torch.zeros(batch, dtype=torch.int32, device=c.device)
        device, host = c_size_t(), c_size_t()
        fixed = (
            self.handle,
            self.parameters,
            c_int(VECTORS),
            c_int(LOWER),
            c_int64(n),
            c_int(R_64F),
            _at(c),
            c_int64(n),
        )
        fixed += (c_int(R_64F), _at(values), c_int(R_64F))
        self._call("cusolverDnXsyevBatched_bufferSize", *fixed, byref(device), byref(host), c_int64(batch))
        work = torch.zeros(max(device.value, 1), dtype=torch.uint8, device=c.device)  # 11.7.1 wants it zeroed
        on_host = ctypes.create_string_buffer(max(host.value, 1))
        self._call("cusolverDnXsyevBatched", *fixed, _at(work), device, on_host, host, _at(info), c_int64(batch))
        return restore(factor, *_top(values, c, k))

    def syevj_batched(self, a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same around cusolverDnDsyevjBatched, which CuPy's batched eigh is made of."""
        factor, c = reduce(a, b)
        batch, n = c.shape[0], c.shape[-1]
        values = torch.empty(batch, n, dtype=c.dtype, device=c.device)
        info, size = torch.zeros(batch, dtype=torch.int32, device=c.device), c_int()
        fixed = (self.handle, c_int(VECTORS), c_int(LOWER), c_int(n), _at(c), c_int(n), _at(values))
        self._call("cusolverDnDsyevjBatched_bufferSize", *fixed, byref(size), self.jacobi, c_int(batch))
        work = torch.empty(max(size.value, 1), dtype=c.dtype, device=c.device)
        self._call("cusolverDnDsyevjBatched", *fixed, _at(work), size, _at(info), self.jacobi, c_int(batch))
        return restore(factor, *_top(values, c, k))


def reduce(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """L and the symmetric C = L^-1 A L^-T of B = L L'."""
    factor = torch.linalg.cholesky(b)
    half = torch.linalg.solve_triangular(factor, a, upper=False)
    return factor, torch.linalg.solve_triangular(factor, half.mT, upper=False).contiguous()


def restore(factor: Tensor, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of C into vectors of the pencil."""
    return values, torch.linalg.solve_triangular(factor.mT, vectors, upper=True)


def torch_eigh(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What torch offers: batched Cholesky, two solves, eigh."""
    factor, c = reduce(a, b)
    values, vectors = torch.linalg.eigh(c)
    return restore(factor, values[:, -k:].flip(-1), vectors[:, :, -k:].flip(-1))


def _top(values: Tensor, vectors_as_rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return values[:, -k:].flip(-1), vectors_as_rows[:, -k:].flip(1).mT


def _at(tensor: Tensor, problem: int = 0) -> c_void_p:
    return c_void_p(tensor[problem].data_ptr() if problem else tensor.data_ptr())


def version() -> str:
    """Of the library, as major.minor.patch."""
    number = c_int()
    ctypes.CDLL(_path()).cusolverGetVersion(byref(number))
    return f"{number.value // 1000}.{number.value // 100 % 10}.{number.value % 100}"


def _path() -> str:
    """The library that torch brought, or else that of the toolkit."""
    try:
        import nvidia
    except ImportError:
        return "libcusolver.so"
    found = (path for root in nvidia.__path__ for path in sorted(Path(root).glob("*/lib/libcusolver.so*")))
    return str(next(found, "libcusolver.so"))
