"""Bytes and numbers that nobody meant, for a bounded time: only the documented errors may come out.

`FUZZ_EXAMPLES=100000 pytest tests/fuzz` looks longer.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sst_kernels as sst
from sst_kernels.fisher import storage
from sst_kernels.gevp import GEVPStatus
from sst_merge.errors import AdapterError, DataError, RecipeError
from sst_merge.io.adapters import CONFIG, WEIGHTS, load_adapter
from sst_merge.io.data import load_dataset
from sst_merge.recipe import Recipe
from tests import merge_cases as cases
from tests.models import tiny_batch, tiny_lora

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES == 25
)


@pytest.fixture(scope="module")
def fisher_bytes(tmp_path_factory) -> bytes:
    path, model = tmp_path_factory.mktemp("fuzz") / "fisher", tiny_lora()
    with sst.fisher_accumulate(model, "safety", structure="lowrank", rank=2) as pass_:
        model(**tiny_batch(2)).loss.backward()
    pass_.save(path)
    return path.read_bytes()


def spoil(raw: bytes, edits: list[tuple[int, bytes]], length: int | None) -> bytes:
    spoiled = bytearray(raw)
    for position, piece in edits:
        at = position % len(raw)
        spoiled[at : at + len(piece)] = piece
    return bytes(spoiled if length is None else spoiled[: length % len(raw)])


EDITS = st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)), max_size=4)


@fuzz
@given(edits=EDITS, length=st.none() | st.integers(0, 1 << 20))
def test_a_spoiled_fisher_is_refused_or_unchanged(fisher_bytes, edits, length):
    raw = spoil(fisher_bytes, edits, length)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(raw)
        if raw == fisher_bytes:
            sst.Fisher.load(path)
            return
        with pytest.raises(ValueError, match="x"):
            sst.Fisher.load(path)


@fuzz
@given(st.binary(max_size=300), st.integers(0, 2**64 - 1) | st.none())
def test_random_bytes_are_no_tensors(body, claim):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(struct.pack("<Q", len(body) if claim is None else claim) + body)
        with pytest.raises(ValueError, match="x"):
            storage.read_tensors(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
CONFIG_KEYS = st.sampled_from(
    ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "use_rslora", "target_modules", "init_lora_weights"]
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return cases.adapter_folder(tmp_path_factory.mktemp("fuzz") / "adapter")


@fuzz
@given(changes=st.dictionaries(CONFIG_KEYS, JSON, min_size=1, max_size=3))
def test_adapter_configurations(adapter, changes):
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((adapter / CONFIG).read_text()) | changes
        (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        (Path(folder) / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes())
        try:
            loaded = load_adapter(folder)
        except AdapterError:
            return
        assert all(torch.isfinite(torch.tensor(term.scaling)) for term in loaded.terms.values())


@fuzz
@given(lines=st.lists(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()), max_size=4))
def test_data_lines(lines):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_bytes(b"\n".join(lines))
        for skip in (False, True):
            try:
                load_dataset(path, cases.tokenizer(None), skip_bad_lines=skip)
            except DataError:
                continue


@fuzz
@given(st.text(max_size=200) | JSON.map(json.dumps))
def test_recipes(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(RecipeError):
            Recipe.load(path)


NUMBERS = st.floats(width=64) | st.sampled_from([0.0, -0.0, 1e-310, 1e300, -1e300, float("nan"), float("inf")])


@fuzz
@given(data=st.data(), n=st.integers(1, 6), method=st.sampled_from(["auto", "direct", "jacobi_davidson"]))
def test_symmetric_pencils_of_any_numbers(data, n, method):
    """Every outcome is a status, and what is called converged is finite and solves the problem it was given."""
    a, b = (
        torch.tensor(data.draw(st.lists(NUMBERS, min_size=n * n, max_size=n * n)), dtype=torch.float64).reshape(n, n)
        for _ in range(2)
    )
    a, b = (torch.where(torch.ones(n, n).tril().bool(), x, x.mT) for x in (a, b))
    k = data.draw(st.integers(0, n))
    result = sst.gevp(a, b, k, method=method)
    status = GEVPStatus(int(result.status))
    assert result.values.shape == (k,)
    if status in (GEVPStatus.converged, GEVPStatus.rank_deficient):
        assert torch.isfinite(result.values).all()
