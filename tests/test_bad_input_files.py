"""Hostile files for sst-merge: data, recipes, outputs, commands. Nothing is executed, overwritten or left behind."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sst_kernels.fisher import StorageError
from sst_merge import cli
from sst_merge.errors import DataError, MergeError, OutputError, RecipeError
from sst_merge.io.data import load_dataset
from sst_merge.io.models import load_model
from sst_merge.io.output import output_file, output_folder
from sst_merge.recipe import Recipe, read_yaml
from tests import merge_cases as cases

GOOD = json.dumps({"prompt": "how?", "response": "so."})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff\xfe", "response": "x"}', r":2: not UTF-8"),
        (b"{", r":2: not JSON"),
        (b"[" * 100_000, r":2: not JSON"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", r":2: not JSON that can be read \(Exceeds the limit"),
        (b'{"prompt": "a"}', r":2: expected an object"),
        (b'["a", "b"]', r":2: expected an object"),
        (b'{"prompt": 1, "response": 2}', r":2: expected two or more messages"),
        (b'{"prompt": "a", "response": ""}', r":2: the answer is empty"),
        (b'{"messages": []}', r":2: expected two or more"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', r":2: expected two or more"),
        (b'{"messages": "no"}', r":2: expected two or more"),
        (json.dumps({"prompt": "x" * 5000, "response": "y"}).encode(), r":2: the prompt alone has"),
        (b'{"prompt": "\\ud800", "response": "x"}', r":2: .*(UTF-8|surrogate|Unicode)"),
        (b'{"prompt": NaN, "response": "x"}', r":2: expected two or more"),
    ],
)
def test_bad_lines_are_named_or_skipped_and_counted(line, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode() + b"\n")
    tokenizer = cases.tokenizer(None)
    with pytest.raises(DataError, match=message):
        load_dataset(path, tokenizer)
    kept = load_dataset(path, tokenizer, skip_bad_lines=True)
    assert len(kept) == 2
    assert kept.summary()["skipped_lines"] == [2]


def test_prompts_beyond_the_context_of_the_model_are_named(tmp_path):
    """Position 256 and later were never trained, whatever max_length allows; answers are cut there."""
    network, tokenizer = load_model(cases.model_folder(tmp_path / "model"), device="cpu")
    path = cases.write_jsonl(tmp_path / "data.jsonl", [{"prompt": "how?", "response": "y" * 500}])
    example = load_dataset(path, tokenizer)[0]
    assert len(example.tokens) == network.config.max_position_embeddings == 256
    assert example.truncated
    cases.write_jsonl(path, [{"prompt": "x" * 500, "response": "y"}])
    with pytest.raises(DataError, match="the prompt alone has 519 tokens and sequences may have 256"):
        load_dataset(path, tokenizer)


def test_files_without_a_good_line_are_refused_even_when_skipping(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"nonsense\n")
    with pytest.raises(DataError, match="holds no examples"):
        load_dataset(path, cases.tokenizer(None), skip_bad_lines=True)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch /tmp/owned']",
        "model: !!python/name:os.system",
        "- a\n- b",
        "42",
        "",
        "model: [unclosed",
        "a: &a [*a]",
        "\x00",
    ],
)
def test_recipes_that_are_not_plain_mappings(text, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):
        Recipe.load(path)


def test_deeply_nested_recipes_do_not_crash(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text("a: " + "[" * 5000, encoding="utf-8")
    with pytest.raises(RecipeError):
        read_yaml(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"kl_bugdet": 0.1}, "did you mean 'kl_budget'"),
        ({"damping": -1}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"damping": float("inf")}, "damping"),
        ({"kl_budget": float("nan")}, "kl_budget"),
        ({"damping": 1e308}, "damping: Input should be less than or equal to"),
        ({"damping": 1e-320}, "damping"),
        ({"label_draws": 10**9}, "label_draws"),
        ({"folds": 1}, "folds"),
        ({"k": 4, "mu": 1.0}, "give one of"),
        ({"scope": "world"}, "scope"),
        ({"seed": "x"}, "seed"),
        ({"limit": 0}, "limit"),
        ({"seed": 2**70}, "seed"),
        ({"seed": -1}, "seed"),
        ({"structure": "hessian"}, "structure: expected one of full, .*got 'hessian'"),
        ({"structure": "eigen_kronecker"}, "structure: expected one of"),
        ({"structure_options": {"rnak": 3}}, "full takes count, dtype, rows, not rnak"),
        ({"structure_options": {"point": "patched"}}, "not point"),
        ({"output": "s"}, "output .*s holds the safety"),
        ({"output": "deep", "harm_data": "deep/data.jsonl"}, "holds the harm_data"),
    ],
)
def test_recipes_with_wrong_entries(entries, message, tmp_path):
    base = {"model": "m", "safety": "s", "harm_data": "h", "benign_data": "b", "output": "o"}
    with pytest.raises(RecipeError, match=message):
        Recipe.parse({**base, **entries})


def test_outputs_appear_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), output_folder(tmp_path / "out") as folder:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise KeyError
    with pytest.raises(KeyError), output_file(tmp_path / "out.json") as file:
        file.write_bytes(b"half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_is_not_replaced(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    link = tmp_path / "link"
    link.symlink_to(precious)
    for path in (precious, link, precious / "thesis.tex"):
        for force in (False, True):
            with pytest.raises(OutputError), output_folder(path, force=force):
                pytest.fail("must not begin")
    with pytest.raises(OutputError), output_file(precious / "thesis.tex"):
        pytest.fail("must not begin")
    assert (precious / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("make", [output_folder, output_file])
def test_of_two_runs_with_one_output_none_is_lost(make, tmp_path):
    """The second to end finds its name taken, overwrites nothing, and says where its own result stands."""

    def fill(place, text):
        (place if place.is_file() else place / "report.json").write_text(text)

    out = tmp_path / "out"
    with pytest.raises(OutputError, match="not free any more") as raised, make(out) as slow:
        fill(slow, "slow")
        with make(out) as quick:
            fill(quick, "quick")
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.read_text(): p.relative_to(tmp_path).parts[0] for p in written} == {"quick": "out", "slow": slow.name}
    assert str(slow) in str(raised.value)


def test_an_output_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    with output_folder(tmp_path / "out") as folder:
        (folder / "report.json").write_text("old")
    rename = Path.rename

    def full(self, target):
        if "-partial-" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with (
        pytest.raises(OutputError, match=r"No space left on device.*complete and stands in .*out-partial-"),
        output_folder(tmp_path / "out", force=True) as folder,
    ):
        (folder / "report.json").write_text("new")
    assert (tmp_path / "out/report.json").read_text() == "old"
    assert (folder / "report.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_inputs_are_not_replaced_whatever_they_are_called(tmp_path):
    """By another way to write the path, or as a file inside an adapter."""
    adapter, data = tmp_path / "adapter", tmp_path / "data.jsonl"
    adapter.mkdir()
    for file in (adapter / "adapter_model.safetensors", data):
        file.write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (data, tmp_path / "link/data.jsonl", adapter / "../data.jsonl", adapter / "adapter_model.safetensors"):
        with (
            pytest.raises(OutputError, match="belongs to the input"),
            output_file(path, force=True, inputs=[adapter, data]),
        ):
            pytest.fail("must not begin")
    base = {"model": "m", "safety": str(adapter), "harm_data": "h", "benign_data": "b"}
    for path in (tmp_path / "link/adapter", tmp_path / "nowhere/../adapter"):
        with pytest.raises(RecipeError, match="holds the safety"):
            Recipe.parse({**base, "output": str(path)})
    assert {p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == {"precious"}


@pytest.mark.parametrize("name", ["x" * 300, "file/below", "zero\0byte"])
@pytest.mark.parametrize("make", [output_folder, output_file])
def test_places_that_cannot_be_created(make, name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another output"), make(tmp_path / name):
        pytest.fail("must not begin")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("make", [output_folder, output_file])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), StorageError("x could not be written")]
)
def test_a_full_disk_names_the_output(make, error, tmp_path):
    with pytest.raises(OutputError, match=r"out: could not be written .*nothing was left"), make(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [output_folder, output_file])
def test_a_place_that_goes_away_names_the_output(make, tmp_path):
    """A disk that turns read-only, or a parent that is deleted, while a run works."""
    with (
        pytest.raises(OutputError, match=r"gone/out: could not be written \(No such file or directory\)"),
        make(tmp_path / "gone/out") as partial,
    ):
        shutil.rmtree(tmp_path / "gone")
        (partial / "report.json" if make is output_folder else partial).write_text("lost")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [output_folder, output_file])
def test_errors_of_other_files_stay_theirs(make, tmp_path):
    with pytest.raises(PermissionError, match="weights"), make(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "weights")


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge"],
        ["merge", "--config", "/nowhere.yml"],
        [
            "merge",
            "--model",
            "/nowhere",
            "--safety",
            "/nowhere",
            "--harm-data",
            "/n",
            "--benign-data",
            "/n",
            "-o",
            "{tmp}/o",
        ],
        ["merge", "--folds", "many"],
        ["fisher", "--model", "/nowhere", "--safety", "/nowhere", "--data", "/nowhere", "-o", "{tmp}/f"],
        ["fisher", "--model", "m"],
        ["evaluate", "--model", "/nowhere"],
        ["no-such-command"],
        ["merge", "--checkpoint-every", "0"],
        ["evaluate", "--model", "m", "--generate-tokens", "-1"],
        ["evaluate", "--model", "m", "--tokens-per-batch", "0"],
        ["evaluate", "--model", "m", "--seed", str(2**80)],
    ],
)
def test_commands_fail_with_a_text_and_leave_nothing(arguments, tmp_path):
    result = CliRunner().invoke(cli.app, [a.format(tmp=tmp_path) for a in arguments])
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit | MergeError), result.exception
    assert list(tmp_path.iterdir()) == []
