"""Builds the extension modules with CMake and Ninja; everything declarative is in pyproject.toml. Never imports torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake run for all modules. Environment: SST_CUDA=OFF skips CUDA, SST_CUDA_ARCHITECTURES="80;90", CMAKE_ARGS adds more."""

    def build_extensions(self):
        output = Path(self.get_ext_fullpath("sst_kernels._native_cpu")).parent.resolve()
        # Headers of NVTX wheels, also those of the environment that an isolated build hides from its own Python.
        wheels = ";".join(f"{entry}/nvidia/{name}" for entry in sys.path for name in ("cu13", "nvtx"))
        arguments = [
            f"-DSST_OUTPUT={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSST_NVIDIA_ROOTS={os.environ.get('SST_NVIDIA_ROOTS', wheels)}",
            f"-DSST_CUDA={os.environ.get('SST_CUDA', 'ON')}",
        ]
        if architectures := os.environ.get("SST_CUDA_ARCHITECTURES"):
            arguments.append(f"-DSST_CUDA_ARCHITECTURES={architectures}")
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # an isolated build's paths do not outlive it
        cmake = shutil.which("cmake") or sys.exit("cmake is missing: pip install cmake ninja pybind11")
        extra = os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *arguments, *extra], check=True)
        subprocess.run([cmake, "--build", build, "-j", os.environ.get("MAX_JOBS", "2")], check=True)

    def get_outputs(self):
        return [str(path) for path in Path(self.build_lib, "sst_kernels").glob("_native_*")]

    def copy_extensions_to_source(
        self,
    ):  # in place and editable: whichever modules were built, not only the declared one
        for built in self.get_outputs():
            self.copy_file(built, str(ROOT / "sst_kernels"))


setup(
    packages=[
        ".".join(("sst_kernels" if root == "sst_kernels" else "sst_merge", *path.parent.relative_to(base).parts))
        for root, base in (("sst_kernels", ROOT / "sst_kernels"), ("sst_merge", ROOT / "python" / "sst_merge"))
        for path in sorted(base.rglob("__init__.py"))
    ],
    ext_modules=[Extension("sst_kernels._native_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
