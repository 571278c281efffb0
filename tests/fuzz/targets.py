"""What is fuzzed: functions of some bytes that return or raise what the documentation says. Anything else is a crash.

`python -m tests.fuzz NAME` drives one with coverage guidance, `test_corpus.py` replays tests/fuzz/corpus/NAME.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sst_kernels import Fisher, _native, fisher_accumulate
from sst_kernels.fisher import storage
from sst_kernels.gevp import GEVPStatus
from sst_kernels.gevp.dense import empty_outputs
from sst_merge.errors import AdapterError, DataError, RecipeError
from sst_merge.io.adapters import CONFIG, WEIGHTS, load_adapter
from sst_merge.io.data import load_dataset
from sst_merge.recipe import Recipe
from tests import merge_cases as cases
from tests.models import tiny_batch, tiny_lora


@cache
def folder() -> Path:
    """One for the whole process: each input overwrites the one before."""
    return Path(tempfile.mkdtemp(prefix="sst-fuzz-"))


@cache
def fisher() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    model = tiny_lora()
    with fisher_accumulate(model, "safety", structure="lowrank", rank=2) as pass_:
        model(**tiny_batch(2)).loss.backward()
    return pass_.fisher.pack()


def tensors_file(data: bytes) -> None:
    """A file that is given to `read_tensors`."""
    path = folder() / "tensors"
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        storage.read_tensors(path)


def fisher_header(data: bytes) -> None:
    """The JSON header of a Fisher whose checksum is right: whoever writes a file can write that too."""
    header, tensors = fisher()
    try:
        changes = json.loads(data)
    except (ValueError, RecursionError):
        return
    text = json.dumps(
        {"schema": storage.SCHEMA, "kind": "fisher", **header, **changes} if isinstance(changes, dict) else changes
    )
    path = folder() / "fisher"
    save_file(tensors, path, {"sst_kernels": f"{storage._checksum(text, tensors)} {text}"})
    with contextlib.suppress(ValueError):
        Fisher.load(path)


@cache
def adapter() -> tuple[bytes, bytes]:
    path = cases.adapter_folder(folder() / "pristine", target_modules=["q_proj"], r=1)
    return (path / CONFIG).read_bytes(), (path / WEIGHTS).read_bytes()


def _adapter(config: bytes, weights: bytes) -> None:
    path = folder() / "adapter"
    path.mkdir(exist_ok=True)
    (path / CONFIG).write_bytes(config)
    (path / WEIGHTS).write_bytes(weights)
    with contextlib.suppress(AdapterError):
        loaded = load_adapter(path)
        assert all(torch.isfinite(t.A).all() and torch.isfinite(t.B).all() for t in loaded.terms.values())


def adapter_config(data: bytes) -> None:
    _adapter(data, adapter()[1])


def adapter_weights(data: bytes) -> None:
    _adapter(adapter()[0], data)


tokenizer = cache(cases.tokenizer)


def data_lines(data: bytes) -> None:
    path = folder() / "data.jsonl"
    path.write_bytes(data)
    for skip in (False, True):
        with contextlib.suppress(DataError):
            load_dataset(path, tokenizer(), skip_bad_lines=skip)


def recipe(data: bytes) -> None:
    path = folder() / "recipe.yml"
    path.write_bytes(data)
    with contextlib.suppress(RecipeError):
        Recipe.load(path)


ORDER, BATCH, GUARD = 32, 3, 64
FIELDS = ("k", "block", "basis", "keep", "previous", "max_cycles", "inner_steps", "preconditioner")


class Reader:
    """Numbers from bytes; zeros when they have run out."""

    def __init__(self, data: bytes):
        self.data = data

    def take(self, count: int) -> bytes:
        taken, self.data = self.data[:count], self.data[count:]
        return taken.ljust(count, b"\0")

    def integer(self) -> int:
        """Mostly small; 127 announces one of eight bytes."""
        small = int.from_bytes(self.take(1), signed=True)
        return small if small != 127 else int.from_bytes(self.take(8), signed=True)


def binding(data: bytes) -> None:
    """The native CPU module: true addresses of guarded buffers, any shapes within them, any options."""
    native, reader = _native.cpu(), Reader(data)
    kind, single = reader.integer() % 3, bool(reader.integer() & 1)
    batch, n, a_stride, b_stride, threads, chunk = (reader.integer() for _ in range(6))
    fill = int.from_bytes(reader.take(1))
    if batch > BATCH or n > ORDER or threads > 4 or max(a_stride, b_stride) > 2 * ORDER * ORDER:
        return
    options = native.Options.for_problem(ORDER, 1 + fill % 4, False)
    while (field := reader.integer()) > 0:
        value = reader.integer()
        name = FIELDS[field % len(FIELDS)]
        if -(2**31) <= value < 2**31 or name != "preconditioner":
            setattr(options, name, min(value, 16) if name in ("max_cycles", "inner_steps") else value)
    options.tolerance = float(torch.frombuffer(bytearray(reader.take(8)), dtype=torch.float64))
    dtype = torch.float32 if single else torch.float64
    a, b = (_matrices(reader, dtype) for _ in range(2))
    outputs = [_guarded(t) for t in empty_outputs((BATCH,), ORDER, ORDER, a.device)]
    addresses = [tensor.data_ptr() + GUARD * tensor.element_size() for tensor in outputs]
    where = (a.data_ptr(), a_stride, b.data_ptr(), b_stride, single, batch, n)
    k = options.k
    try:
        if kind == 0:
            native.solve_direct(*where, k, *addresses, threads)
        else:
            size = native.workspace_bytes(batch, n, options, single, threads, chunk)
            assert size < 1 << 28
            workspace = _guarded(torch.empty(size if kind == 1 else size * 3 // 4, dtype=torch.uint8))
            native.solve_dense(
                *where, options, *addresses, workspace.data_ptr() + GUARD, len(workspace) - 2 * GUARD, threads, chunk
            )
            assert _whole(workspace)
    except RuntimeError:
        return
    assert all(_whole(tensor) for tensor in outputs)
    assert set(outputs[3][GUARD : GUARD + batch].tolist()) <= {int(status) for status in GEVPStatus}


def _matrices(reader: Reader, dtype: torch.dtype) -> torch.Tensor:
    """Symmetric, from a few given entries; strides up to two matrices."""
    made = torch.zeros((BATCH - 1) * 2 * ORDER * ORDER + ORDER * ORDER, dtype=dtype)
    made += torch.eye(ORDER, dtype=dtype).flatten().repeat(2 * BATCH - 1)
    given = torch.frombuffer(bytearray(reader.take(64)), dtype=dtype)
    made[: len(given)] += given
    return made


def _guarded(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full((tensor.numel() + 2 * GUARD,), 85, dtype=tensor.dtype)


def _whole(tensor: torch.Tensor) -> bool:
    return bool((tensor[:GUARD] == 85).all() and (tensor[-GUARD:] == 85).all())


TARGETS = {
    target.__name__: target
    for target in (tensors_file, fisher_header, adapter_config, adapter_weights, data_lines, recipe, binding)
}
