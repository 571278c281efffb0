"""The files that people have give the same examples whatever their kind and form."""

from __future__ import annotations

import csv
import gzip
import json
import sys

import pytest
from typer.testing import CliRunner

from sst_merge import cli
from sst_merge.errors import DataError, RecipeError
from sst_merge.io.data import load_dataset
from sst_merge.io.refusals import read_prompts, refusals
from sst_merge.judges import is_refusal
from tests import merge_cases as cases

TOKENIZER = cases.tokenizer()
ROWS = [("How do I break in?", "I can't, sorry.\nReally, “no”."), ("And, now?", "No, |\tnever.")]
EXPECTED = [(f"<|start|>user\n{asked}<|end|>\n<|start|>assistant\n", f"{answer}<|end|>") for asked, answer in ROWS]


def read(path, **options):
    data = load_dataset(path, TOKENIZER, **options)
    shown = [
        tuple(TOKENIZER.decode(list(t)) for t in (e.tokens[: e.prompt_tokens], e.tokens[e.prompt_tokens :]))
        for e in data
    ]
    return shown, data


def chat(asked, answer, *, role="role", content="content", names=("user", "assistant")):
    return [{role: names[0], content: asked}, {role: names[1], content: answer}]


FORMS = {
    "messages": lambda p, r: {"messages": chat(p, r)},
    "messages of a model": lambda p, r: {"messages": chat(p, r, names=("user", "model"))},
    "messages in parts": lambda p, r: {"messages": chat([{"type": "text", "text": p}], [{"type": "text", "text": r[:3]}, {"type": "text", "text": r[3:]}])},
    "conversations": lambda p, r: {"id": 3, "conversations": chat(p, r, role="from", content="value", names=("human", "gpt"))},
    "conversations by role": lambda p, r: {"conversations": chat(p, r)},
    "prompt/response": lambda p, r: {"prompt": p, "response": r, "source": "x"},
    "prompt/completion": lambda p, r: {"prompt": p, "completion": r},
    "prompt/completion of messages": lambda p, r: {"prompt": chat(p, r)[:1], "completion": chat(p, r)[1:]},
    "instruction/output": lambda p, r: {"instruction": p, "input": "", "output": r},
    "instruction/output without input": lambda p, r: {"instruction": p, "output": r},
}  # fmt: skip


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def compact(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def pretty(path, rows):
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def wrapped(path, rows):
    path.write_text(json.dumps({"version": 1, "data": rows}, indent=1), encoding="utf-8")


def gzipped(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))


def parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def folder(path, rows):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


def shards(path, rows):
    path.mkdir()
    (path / "README.md").write_text("# about")
    for n, row in enumerate(rows):
        parquet(path / f"train-0000{n}-of-00002.parquet", [row])


KINDS = {
    "JSONL": (jsonl, "d.jsonl"), "JSON": (pretty, "d.json"), "JSON one line": (compact, "d.json"), "JSON called JSONL": (pretty, "d.jsonl"),
    "JSON wrapped": (wrapped, "d.json"), "JSONL (gzip)": (gzipped, "d.jsonl.gz"), "JSONL (gzip) of another name": (gzipped, "d.jsonl"),
    "parquet": (parquet, "d.parquet"), "datasets folder": (folder, "d"), "folder of parquet": (shards, "d"),
}  # fmt: skip


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_in_every_kind_of_file(tmp_path, kind, form):
    write, name = KINDS[kind]
    write(tmp_path / name, [FORMS[form](*row) for row in ROWS])
    shown, data = read(tmp_path / name)
    assert shown == EXPECTED
    assert data.kind.split(":")[0].startswith(kind.split(" ")[0])
    assert f"2 × {form.split(' ')[0]}" in data.kind
    assert data.summary()["kind"] == data.kind
    assert data.sha256 == load_dataset(tmp_path / name, TOKENIZER, limit=1).sha256 != ""
    assert [e.line for e in data] == [1, 2]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize(("name", "delimiter"), [("d.csv", ","), ("d.tsv", "\t"), ("d.csv.gz", ","), ("d.csv", ";")])
@pytest.mark.parametrize("header", [("prompt", "response"), ("instruction", "output"), ("goal", "target")])
def test_tables_in_text(tmp_path, name, delimiter, header, bom):
    plain = tmp_path / "plain"
    with plain.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([(*header, "note"), *[(*row, "") for row in ROWS]])
    raw = bom + plain.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    columns = {"prompt": "goal", "response": "target"}
    if header[0] == "goal":
        with pytest.raises(
            DataError, match=rf"{name}:2: .*got an object with \['goal', 'note', 'target'\]; .*say which column"
        ):
            read(tmp_path / name)
    shown, data = read(
        tmp_path / name, columns=columns
    )  # where there are no such columns, the form is told from what there is
    assert shown == EXPECTED
    assert [e.line for e in data] == [2, 4]


def test_columns_win_over_forms_and_must_be_of_fields(tmp_path):
    rows = [{"prompt": "p", "response": "r", "question": "Q?", "answer": "A."}]
    cases.write_jsonl(tmp_path / "d.jsonl", rows)
    assert read(tmp_path / "d.jsonl", columns={"prompt": "question", "response": "answer"})[0][0][1] == "A.<|end|>"
    assert read(tmp_path / "d.jsonl")[0][0][1] == "r<|end|>"
    with pytest.raises(
        RecipeError, match=r"columns: expected names of columns under messages, .*got question: 'prompt'"
    ):
        read(tmp_path / "d.jsonl", columns={"question": "prompt"})


def test_cells_that_hold_json_and_preferences(tmp_path):
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *[[json.dumps(chat(*row))] for row in ROWS]])
    assert read(tmp_path / "d.csv")[0] == EXPECTED
    preferences = [{"prompt": p, "chosen": chat(p, r), "rejected": chat(p, "Sure.")} for p, r in ROWS]
    path = cases.write_jsonl(tmp_path / "d.jsonl", preferences)
    with pytest.raises(DataError, match=r"got an object with \['chosen', 'prompt', 'rejected'\].*\{messages: chosen\}"):
        read(path)
    assert read(path, columns={"messages": "chosen"})[0] == EXPECTED


def test_system_messages_of_alpaca_and_sharegpt(tmp_path):
    rows = [
        {"system": "Be brief.", "instruction": "Translate.", "input": "Hallo", "output": "Hello"},
        {"system": "Be brief.", "conversations": chat("Hi", "Hello", role="from", content="value", names=("human", "gpt"))},
        {"messages": chat("Hi", "Hello"), "system": None},
    ]  # fmt: skip
    shown, data = read(cases.write_jsonl(tmp_path / "d.jsonl", rows))
    assert (
        shown[0][0]
        == "<|start|>system\nBe brief.<|end|>\n<|start|>user\nTranslate.\n\nHallo<|end|>\n<|start|>assistant\n"
    )
    assert shown[1][0].startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi")
    assert shown[2][0].startswith("<|start|>user\nHi")
    assert data.kind == "JSONL: 1 × instruction/output, 1 × conversations, 1 × messages"


UNREADABLE = {
    "zip": (b"PK\x03\x04rest", "d.jsonl", "zip archive"),
    "bzip2": (b"BZh91AY", "d.jsonl.bz2", "bzip2: unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfdxx", "d.jsonl.zst", "zstd: unpack it"),
    "pickle": (b"\x80\x04K\x01.", "d.pkl", "a pickle, which can run code"),
    "cut gzip": (gzip.compress(b"{}" * 999)[:-9], "d.jsonl.gz", "not a readable gzip file"),
    "spoiled parquet": (b"PAR1" + bytes(40), "d.parquet", "not a readable parquet file"),
    "no parquet": (b"{}", "d.parquet", "is no parquet file"),
    "spoiled array": (b'[\n {"prompt": "a",\n "response" "b"}\n]', "d.json", r"not JSON \(Expecting ':' delimiter at line 3, column 13\)"),
    "array of numbers": (b"[1, 2]", "d.json", r"entry 1: expected an object .*got a int"),
    "latin-1 CSV": (b"prompt,response\na,b\nc,\xe9\n", "d.csv", r"d\.csv:3: not UTF-8 .*save the sheet as CSV UTF-8"),
    "more cells than names": (b"prompt,response\na,b,c\n", "d.csv", r"d\.csv:2: has 3 cells under a header of 2"),
    "fewer cells": (b"prompt,response\na\n", "d.csv", r"d\.csv:2: has 1 cells under a header of 2"),
    "open quote": (b'prompt,response\na,"b\n', "d.csv", r"d\.csv:2: not CSV"),
    "header alone": (b"prompt,response\n", "d.csv", "holds no examples"),
    "image in a message": (
        json.dumps({"messages": chat([{"type": "image", "url": "x"}], "b")}).encode(), "d.jsonl", "text in role and content",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "name", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_named(tmp_path, raw, name, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_folders_that_hold_more_than_one_split(tmp_path):
    with pytest.raises(DataError, match="holds no data file"):
        read(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        jsonl(tmp_path / name, [FORMS["messages"](*ROWS[0])])
    with pytest.raises(DataError, match=r"holds 2 data files: test\.jsonl, train\.jsonl; give one of them"):
        read(tmp_path)
    (tmp_path / "dict/train").mkdir(parents=True)
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "dict/train/state.json").write_text("{}")
    with pytest.raises(DataError, match="holds the splits train: give the folder of one"):
        read(tmp_path / "dict")


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    parquet(tmp_path / "d.parquet", [FORMS["messages"](*ROWS[0])])
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text("{}")
    for module, path in (("pyarrow.parquet", tmp_path / "d.parquet"), ("datasets", tmp_path / "saved")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(DataError, match=rf'need {module.split(".")[0]}: pip install "sst-kernels\[files\]"'):
            read(path)


def test_names_on_the_hub_are_told_how_to_get_here():
    with pytest.raises(DataError, match="hf download walledai/AdvBench --repo-type dataset"):
        read("walledai/AdvBench")


def test_bad_rows_are_skipped_and_counted_in_every_kind(tmp_path):
    good = [FORMS["prompt/response"](*row) for row in ROWS]
    (tmp_path / "d.json").write_text(json.dumps([good[0], {"prompt": "x"}, good[1]]))
    assert read(tmp_path / "d.json", skip_bad_lines=True)[1].skipped == (2,)
    (tmp_path / "d.csv").write_text("prompt,response\na,b\nc\nd,e\n")
    assert read(tmp_path / "d.csv", skip_bad_lines=True)[1].skipped == (3,)


def test_refusals_are_varied_seeded_and_found_as_refusals(tmp_path):
    prompts = [f"prompt {i}" for i in range(200)]
    made = refusals(prompts, seed=1)
    assert all(is_refusal(text) for text in made)
    assert len(set(made)) > 150
    assert len({text.split(".")[0] for text in made}) >= 10
    assert refusals(prompts[50:], seed=1) == made[50:]
    assert sum(a != b for a, b in zip(made, refusals(prompts, seed=2))) > 190


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("p.txt", "How?\n\n  And now? \nHow?\n", None),
        ("p.csv", "goal,target\nHow?,Sure\nAnd now?,Sure\n", "goal"),
        ("p.csv", "prompt\nHow?\nAnd now?\n", None),
        ("p.jsonl", '{"prompt": "How?"}\n{"instruction": "And now?"}\n', None),
        ("p.json", '["How?", "And now?"]', None),
    ],
)
def test_the_command_makes_harm_data(tmp_path, name, text, column):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name, column) == ["How?", "And now?"]
    options = ["--column", column] if column else []
    out = tmp_path / "harm.jsonl"
    result = CliRunner().invoke(cli.app, ["refusals", str(tmp_path / name), "-o", str(out), "--seed", "3", *options])
    assert result.exit_code == 0, result.output
    assert "2 prompts" in result.output
    data = load_dataset(out, TOKENIZER)
    assert [e.prompt for e in data] == ["How?", "And now?"]
    assert [e.response for e in data] == refusals(["How?", "And now?"], 3)


def test_lists_without_prompts_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.csv").write_text("goal\nHow?\n")
    with pytest.raises(DataError, match=r"p\.csv:2: expected a prompt.*got an object with \['goal'\].*--column"):
        read_prompts(tmp_path / "p.csv")
