"""Data files: what is read, where the loss lies, and what is refused with its line."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_merge.errors import DataError
from sst_merge.io.data import IGNORE, Dataset, Example, batches, collate, load_dataset, prompt_batches
from tests import merge_cases as cases

TOKENIZER = cases.tokenizer()


def text(tokens):
    return TOKENIZER.decode(list(tokens), skip_special_tokens=False)


def test_only_the_last_answer_carries_loss(tmp_path):
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "naïve ∂"},
    ]
    path = cases.write_jsonl(tmp_path / "d.jsonl", [{"messages": chat}, {"prompt": "c", "response": "naïve ∂"}])
    for example in (data := load_dataset(path, TOKENIZER)):
        assert text(example.tokens[: example.prompt_tokens]).endswith("<|start|>user\nc<|end|>\n<|start|>assistant\n")
        assert text(example.tokens[example.prompt_tokens :]) == "naïve ∂<|end|>"
        assert (example.prompt, example.response) == ("c", "naïve ∂")
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    batch = collate(data, [1, 0])
    for n, row in enumerate((1, 0)):
        wanted = batch.labels[n][batch.labels[n] != IGNORE]
        assert tuple(wanted.tolist()) == data[row].tokens[data[row].prompt_tokens :]
        assert batch.attention_mask[n].sum() == len(data[row].tokens)


def test_without_chat_template_texts_are_joined(tmp_path):
    plain = cases.tokenizer(chat=None)
    path = cases.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "2+2=", "response": "4"}])
    example = load_dataset(path, plain)[0]
    assert text(example.tokens) == "<|start|>2+2=4<|end|>"
    assert example.labels == 2
    messages = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    with pytest.raises(DataError, match="no chat template"):
        load_dataset(cases.write_jsonl(path, [{"messages": messages}]), plain)


def test_truncation_is_counted_and_prompts_are_never_cut(tmp_path):
    path = cases.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "hi", "response": "x" * n} for n in (2, 60)])
    prompt = load_dataset(path, TOKENIZER)[0].prompt_tokens
    data = load_dataset(path, TOKENIZER, max_length=prompt + 10)
    assert [e.labels for e in data] == [3, 10]
    assert data.summary()["truncated"] == 1
    assert len(load_dataset(path, TOKENIZER, limit=1)) == 1
    with pytest.raises(DataError, match=r"d\.jsonl:1: the prompt alone has \d+ tokens"):
        load_dataset(path, TOKENIZER, max_length=prompt)


BAD = {
    "not UTF-8": b'{"prompt": "\xff", "response": "b"}',
    "not JSON": b'{"prompt": ',
    "got a list": b"[1, 2]",
    "got an object with \\['question'\\]": b'{"question": "x"}',
    "text in role and content": b'{"prompt": "x", "response": 3}',
    "the assistant's last": b'{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}',
    "two or more messages": b'{"messages": [{"role": "assistant", "content": "x"}]}',
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_bad_lines_are_named(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps({"prompt": "a", "response": "b"}).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError, match=rf"d\.jsonl:3: .*{next(k for k, v in BAD.items() if v is line)}"):
        load_dataset(path, TOKENIZER)


def test_empty_missing_and_untemplatable(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(tmp_path / "no.jsonl", TOKENIZER)
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no examples"):
        load_dataset(tmp_path / "d.jsonl", TOKENIZER)
    path = cases.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}])
    rewriting = cases.tokenizer("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(DataError, match="not a prefix"):
        load_dataset(path, rewriting)
    silent = cases.tokenizer("{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match="answer is empty"):
        load_dataset(path, silent)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40), st.integers(1, 120))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    data = Dataset(tuple(Example(tuple(range(p + a)), p, "", "", i) for i, (p, a) in enumerate(lengths)), pad_id=7)
    made = batches(data, budget)
    assert sorted(row for b in made for row in b.rows) == list(range(len(data)))
    for b in made:
        assert b.input_ids.numel() <= budget or len(b.rows) == 1
        assert int((b.labels != IGNORE).sum()) == sum(data[r].labels for r in b.rows)
    widths = [b.input_ids.shape[1] for b in made]
    assert widths == sorted(widths, reverse=True)
    shuffled = batches(data, budget, seed=3)
    assert sorted(map(tuple, (b.rows for b in shuffled))) == sorted(map(tuple, (b.rows for b in made)))
    assert [b.rows for b in shuffled] == [b.rows for b in batches(data, budget, seed=3)]
    for rows, ids, mask in prompt_batches(data, 8):
        assert mask.sum(1).tolist() == [data[r].prompt_tokens for r in rows]
        assert torch.equal(ids[:, -1], torch.tensor([data[r].prompt_tokens - 1 for r in rows]))
