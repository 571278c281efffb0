"""Where `gevp` of tensors on the CPU can be computed: by the CPU module, by csrc/cuda emulated on the host, by csrc/cuda on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
from torch import Tensor

from sst_kernels import _native
from sst_kernels.gevp import GEVPResult, gevp, stored
from tests.emulation import EmulatedGPU

GPU = pytest.param("gpu", marks=pytest.mark.gpu)
Solve = Callable[..., GEVPResult]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> EmulatedGPU:
    return EmulatedGPU(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def native() -> ModuleType:
    try:
        return _native.cuda()
    except ImportError as error:
        pytest.fail(f"the CUDA module does not load: {error}")


def backend(request: pytest.FixtureRequest) -> Solve:
    """`gevp` where the fixture's parameter says: "cpu", "emulated" or "gpu"."""
    match request.param:
        case "cpu":
            return gevp
        case "emulated":
            return on_host(request.getfixturevalue("emulated"))
        case _:
            request.getfixturevalue("native")
            return on_gpu


def on_host(emulated: EmulatedGPU) -> Solve:
    def solve(a: Tensor, b: Tensor, k: int, **settings) -> GEVPResult:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stored, "gevp_dense", emulated.gevp_dense)
            return gevp(a, b, k, **settings)

    return solve


def on_gpu(a: Tensor, b: Tensor, k: int, **settings) -> GEVPResult:
    result = gevp(a.cuda(), b.cuda(), k, **settings)
    return replace(result, **{name: x.cpu() for name, x in vars(result).items() if isinstance(x, Tensor)})
