"""How many kernels a batch launches at Llama-2-7B's 224 modules, counted without a GPU: on tensors without data, by launchers
whose kernels do not run. docs/structures.md states the counts."""

from __future__ import annotations

import importlib
import re
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.common import ROOT
from bench.shapes import SHAPES
from sst_kernels.fisher import STRUCTURES
from sst_kernels.fisher.base import Counts, TokenBatch
from sst_kernels.fisher.later import Later
from sst_kernels.ops import tiles

OPS = ("core_outer", "factor_rows", "factor_moments", "gram", "sketch", "eigen_moments")
SHAPE, B, T, R = SHAPES["llama-2-7b"], 8, 512, 16
# Torch operations that launch nothing: views and allocations.
SILENT = re.compile(
    r"empty|view|slice|select|^t$|transpose|squeeze|expand|as_strided|detach|alias|permute|split|unbind"
)


def foreach_launches(tensors) -> int:
    """Of a torch._foreach operation on two lists: at most 64 tensors and 320 chunks of 65536 elements a launch (MultiTensorApply.cuh)."""
    launches = count = chunks = 0
    for tensor in tensors:
        count += 1
        for _ in range(-(-tensor.numel() // 65536)):
            chunks += 1
            if chunks == 320:
                launches, count, chunks = launches + 1, 1, 0
        if count == 64:
            launches, count, chunks = launches + 1, 0, 0
    return launches + bool(chunks)


class Launches(TorchDispatchMode):
    """Counts torch operations on tensors without data, which are those of the device, and calls of the launchers."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        out = func(*args, **(kwargs or {}))
        if name.startswith("_foreach"):
            self.counts[name] += foreach_launches(args[0])
        elif torch.is_tensor(out) and out.device.type == "meta" and not SILENT.search(name):
            self.counts[name] += 1
        return out

    def launch(self, kernel, grid, *args, **meta) -> None:
        self.counts[getattr(kernel, "__name__", None) or kernel.fn.__name__] += 1


@pytest.fixture
def launches(monkeypatch):
    """A `Launches` that the launchers of all ops report to; CPU forms are replaced by launchers."""
    counter = Launches()
    kernels, forms = (
        [importlib.import_module(f"sst_kernels.ops.{op}.{part}") for op in OPS] for part in ("kernel", "op")
    )
    for module in (tiles, *(kernel for kernel in kernels if hasattr(kernel, "launch"))):
        monkeypatch.setattr(module, "launch", counter.launch)
    for op, kernel, form in zip(OPS, kernels, forms):
        monkeypatch.setattr(form, f"_{op}", getattr(kernel, op))
    monkeypatch.setattr(
        importlib.import_module("sst_kernels.ops.core_outer.kernel"), "_upload", lambda entries, _: entries
    )
    return counter


def empty(*shape: int, at: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without data, its address `at` · 16 elements."""
    count = torch.Size(shape).numel()
    return torch.empty(count + 16 * at, dtype=dtype, device="meta")[16 * at :].view(shape)


def layer(number: int) -> list[tuple[tuple[int, int], torch.Tensor, torch.Tensor]]:
    """(shape, left, right) of the factor blocks of one layer, in the order in which a backward pass brings them."""
    inputs = {
        name: empty(B * T, d, at=100 * number + i)
        for i, (name, d) in enumerate((("qkv", 4096), ("o", 4096), ("mlp", 4096), ("down", 11008)), 1)
    }
    reads = {
        "q_proj": "qkv",
        "k_proj": "qkv",
        "v_proj": "qkv",
        "o_proj": "o",
        "gate_proj": "mlp",
        "up_proj": "mlp",
        "down_proj": "down",
    }
    blocks = []
    for i, (name, (p, q)) in enumerate(reversed(SHAPE.linears().items())):
        at = 100 * number + 10 * i + 10
        blocks.append(((R, q), empty(B * T, R, at=at), inputs[reads[name.split(".")[1]]]))
        blocks.append(((p, R), empty(B * T, p, at=at + 1), empty(B * T, R, at=at + 2)))
    return blocks


def test_core_gradients_of_all_modules_are_one_launch(launches):
    from sst_kernels.ops.core_outer.kernel import core_outer

    modules = len(SHAPE.modules())
    tokens = [empty(B * T, R, at=i) for i in range(modules)]
    core_outer(
        tokens, tokens, empty(B, 2, dtype=torch.int64), empty(B, dtype=torch.float32), empty(B, modules * R * R), "ieee"
    )
    assert launches.counts == {"core_outer_kernel": 1}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("diagonal", {}), ("vila", {}), ("kronecker", {}), ("kronecker_lowrank", {"rank": 64}), ("lowrank", {"rank": 16})],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_launches_of_a_batch_are_those_documented(launches, kind, options):
    """The second batch, of all layers."""
    blocks = [block for number in range(SHAPE.layers) for block in layer(number)]
    spans, scale = empty(B, 2, dtype=torch.int64), empty(B, dtype=torch.float32)
    structures = [STRUCTURES[kind](shape, device="meta", **options) for shape, *_ in blocks]
    for _ in range(2):
        launches.counts.clear()
        later = Later()
        with launches:
            for structure, (_, left, right) in zip(structures, blocks):
                structure.update(TokenBatch(left, right, spans, scale, Counts(B, B * T, B * T), later=later))
            later.settle()
    total = launches.counts.total()
    stated = re.search(rf"^\| `{kind}`[^|]*\| (\d[\d ]*) \|", (ROOT / "docs/structures.md").read_text(), re.MULTILINE)
    assert stated, f"docs/structures.md states no launches of {kind}"
    assert int(stated[1].replace(" ", "")) == total, dict(launches.counts)
