"""csrc/cuda on a machine without a GPU: its sources, rewritten where C++ has no words for CUDA's, compiled against the host's
emulation of the CUDA runtime in tests/cpp/emulation."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sst_kernels.gevp.dense import empty_outputs, iteration_options

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
EMULATION = ROOT / "tests" / "cpp" / "emulation"
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
STREAM = 7  # any that is not the default one

_LAUNCH = re.compile(r"(?P<kernel>[A-Za-z_]\w*(?:<[^;{}()]*?>)?)\s*<<<(?P<grid>.*?)>>>\s*\(", re.DOTALL)
_SHARED = re.compile(r"(?<!extern )__shared__ (?:__align__\(\d+\) )?(\w+) (\w+)((?:\[[^\]]+\])+);")
_TENSOR_CORE = """asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(c[0]), "+d"(c[1])
        : "d"(a), "d"(b));"""
_WIDE_TENSOR_CORE = """asm("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+d"(upper[0]), "+d"(upper[1]), "+d"(lower[0]), "+d"(lower[1])
        : "d"(a_upper), "d"(a_lower), "d"(b));"""


def translated(source: str) -> str:
    """CUDA C++ as C++: launches, shared memory and the tensor-core instruction are calls of the emulation."""
    source = _SHARED.sub(
        r"using \2_array = \1\3; "
        r'auto& \2 = *reinterpret_cast<\2_array*>(::emulation::static_shared("\2", sizeof(\2_array)));',
        source,
    )
    source = re.sub(
        r"extern __shared__ double (\w+)\[\];",
        r"double* const \1 = reinterpret_cast<double*>(::emulation::dynamic_shared());",
        source,
    )
    source = source.replace(_TENSOR_CORE, "::emulation::mma_8x8x4(__FILE__, __LINE__, c, a, b);")
    wide = "::emulation::mma_16x8x4(__FILE__, __LINE__, upper, lower, a_upper, a_lower, b);"
    source = source.replace(_WIDE_TENSOR_CORE, wide)
    assert not re.search(r"__shared__|\basm\b", source), (
        "there is something in this source that the emulation does not know"
    )
    parts, position = [], 0
    for launch in _LAUNCH.finditer(source):
        end = _closing(source, launch.end())
        kernel, grid, arguments = launch["kernel"], launch["grid"], source[launch.end() : end]
        name = kernel.split("<")[0]
        call = f'::emulation::launch("{name}", ::emulation::Grid{{{grid}}}, [=] {{ {kernel}({arguments}); }})'
        parts += [source[position : launch.start()], call]
        position = end + 1
    source = "".join([*parts, source[position:]])
    assert "<<<" not in source, "there is a launch in this source that the emulation does not know"
    return source


def _closing(source: str, position: int) -> int:
    """Where the parenthesis that was opened before `position` closes."""
    depth = 1
    while depth:
        depth += {"(": 1, ")": -1}.get(source[position], 0)
        position += 1
    return position - 1


def build(
    target: Path, source: Path, kernels: Iterable[str], flags: Sequence[str] = (), change: tuple[str, str] = ("", "")
) -> Path:
    """Compiles `source` and csrc/cuda/{kernels}.cu, translated into the folder of `target`, and links them with the emulation.

    `change` is a line of csrc/cuda and what it is replaced by: what breaks when the kernels are not what they should be.
    """
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    pybind11 = pytest.importorskip("pybind11")
    folder = target.parent
    (folder / "cuda").mkdir(parents=True)
    texts = {path.name: path.read_text() for path in CUDA.iterdir()}
    assert not change[0] or sum(text.count(change[0]) for text in texts.values()) == 1, f"{change[0]!r} is not one line"
    for name, text in texts.items():
        (folder / "cuda" / name).write_text(translated(text.replace(*change) if change[0] else text))
    own = folder / source.name
    own.write_text(translated(source.read_text()))
    includes = [folder, EMULATION, ROOT / "csrc", ROOT / "csrc" / "include", ROOT / "tests" / "cpp"]
    includes += [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    # C++20 calls a lambda's silent capture of `this` deprecated: on a GPU that is the host's address. Fibers are long jumps.
    command = ["c++", "-std=c++20", "-Werror=deprecated", "-O2", "-g1", "-U_FORTIFY_SOURCE", "-fPIC", "-pthread"]
    command += ["-fvisibility=hidden", "-D__CUDA_ARCH__=900", *flags]

    def compiled(path: Path) -> str:
        made = folder / f"{path.name}.o"
        run([*command, *(f"-I{include}" for include in includes), "-x", "c++", "-c", str(path), "-o", str(made)])
        return str(made)

    sources = [own, EMULATION / "runtime.cpp", *(folder / "cuda" / f"{name}.cu" for name in kernels)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        run([*command, *pool.map(compiled, sources), "-o", str(target)])
    return target


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


class EmulatedGPU:
    """The whole CUDA module on the host. Tensors of the CPU are copied to what stands for a GPU's memory, and results back."""

    def __init__(self, folder: Path):
        names = [path.stem for path in CUDA.glob("*.cu")]
        path = build(folder / "_native_cuda.so", ROOT / "csrc" / "bindings" / "native_cuda.cpp", names, ["-shared"])
        os.environ["SST_CUSOLVER"] = str(path)  # the emulated eigensolver lies in the same library
        found = spec_from_file_location("_native_cuda", path)
        assert found
        assert found.loader
        self.native = module_from_spec(found)
        found.loader.exec_module(self.native)
        self._runtime = ctypes.CDLL(str(path))
        self._runtime.cudaGetErrorString.restype = ctypes.c_char_p
        self._runtime.emulation_waits.restype = ctypes.c_uint64
        self.waits = 0  # of the host for its stream, within the last solve

    def schedule(self, seed: int) -> None:
        """Draws the order of threads anew."""
        self._runtime.emulation_seed(ctypes.c_uint64(seed))

    def gevp_dense(
        self,
        a: Tensor,
        b: Tensor,
        k: int,
        method: str,
        preconditioner: str,
        tol: float,
        max_cycles: int,
        seed: int,
        leave: bool = False,
    ) -> tuple[Tensor, ...]:
        """`sst_kernels.gevp.dense.gevp_dense` by csrc/cuda."""
        shape, n, single = a.shape[:-2], a.shape[-1], a.dtype is torch.float32
        batch, outputs = shape.numel(), empty_outputs(shape, n, k, a.device)
        with ExitStack() as held:
            sides = [self._put(held, x) for x in (a, b)]
            addresses = [self._put(held, x) for x in outputs]
            where = (sides[0], n * n, sides[1], n * n, single, batch, n)
            before = self._runtime.emulation_waits()
            if method == "direct":
                size = self.native.direct_workspace_bytes(batch, n, k, single, STREAM)
                self.native.solve_direct(*where, k, *addresses, self._memory(held, size), size, STREAM)
            else:
                options = iteration_options(self.native, n, k, preconditioner, on_gpu=True)
                options.tolerance, options.max_cycles, options.seed = tol, max_cycles, seed
                size = self.native.workspace_bytes(batch, n, options, single, STREAM)
                self.native.solve_dense(*where, options, *addresses, self._memory(held, size), size, STREAM)
            self.waits = self._runtime.emulation_waits() - before
            return self._fetched(addresses, outputs)

    def gevp_products(self, products: Sequence[Callable[[Tensor], Tensor]], n: int, k: int) -> tuple[Tensor, ...]:
        """One pencil known by A X, B X and B^-1 X; results as those of `gevp_dense`."""
        options = iteration_options(self.native, n, k, "exact", on_gpu=True)
        options.tolerance = 1e-10

        def apply(which: int, source: int, target: int, columns: int) -> None:
            x = torch.empty(columns, n, dtype=torch.float64)
            self._copy(x.data_ptr(), source, x.nbytes, DEVICE_TO_HOST)
            y = products[which](x.mT).mT.contiguous()
            self._copy(target, y.data_ptr(), y.nbytes, HOST_TO_DEVICE)

        outputs = empty_outputs((), n, k, torch.device("cpu"))
        with ExitStack() as held:
            addresses = [self._put(held, x) for x in outputs]
            size = self.native.operator_workspace_bytes(n, options, STREAM)
            self.native.solve_operator(apply, n, options, *addresses, self._memory(held, size), size, STREAM)
            return self._fetched(addresses, outputs)

    def _memory(self, held: ExitStack, size: int) -> int:
        address = ctypes.c_void_p()
        self._check(self._runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(max(size, 1))))
        held.callback(self._runtime.cudaFree, address)
        assert address.value
        return address.value

    def _put(self, held: ExitStack, x: Tensor) -> int:
        address = self._memory(held, x.nbytes)
        self._copy(address, x.data_ptr(), x.nbytes, HOST_TO_DEVICE)
        return address

    def _copy(self, target: int, source: int, size: int, kind: int) -> None:
        where = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._check(self._runtime.cudaMemcpyAsync(*where, ctypes.c_size_t(size), kind, None))
        self._check(self._runtime.cudaStreamSynchronize(None))

    def _fetched(self, addresses: Sequence[int], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for address, x in zip(addresses, outputs):
            self._copy(x.data_ptr(), address, x.nbytes, DEVICE_TO_HOST)
        return outputs

    def _check(self, error: int) -> None:
        if error:
            raise RuntimeError(self._runtime.cudaGetErrorString(error).decode())
