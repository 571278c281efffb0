"""Labels are the answer, whatever the chat template writes around it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sst_kernels as sst
from sst_merge.errors import DataError, RecipeError
from sst_merge.io.chat import TODAY, Renderer
from sst_merge.io.data import IGNORE, collate, load_dataset, prompt_batches, rendered_example
from tests import merge_cases as cases
from tests.chat_templates import ANSWER, CASES, DEEPSEEK_R1, DEEPSEEK_V31, GLM45, GPT_OSS, LLAMA3, QWEN3, SPECIAL

PLAIN = [{"prompt": "How?", "response": ANSWER}]


def tokenizer(template, *, special: bool = True):
    made = cases.tokenizer(template)
    if special:
        made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def load(tmp_path, template, rows, *, special=True, **options):
    path = cases.write_jsonl(tmp_path / "d.jsonl", rows)
    return load_dataset(path, tokenizer(template, special=special), template=options or None)


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_labels_are_the_answer_and_its_end(tmp_path, case, special):
    if not special and case.end == "[e~[":
        case = type(case)(case.template, case.prompt, "", case.options)  # no marker that could be told from text
    data = load(tmp_path, case.template, PLAIN, special=special, **case.options)
    assert data.shown[1] == ANSWER + case.end
    assert data.shown[0].endswith(case.prompt)
    assert rendered_example(data) == data.shown[0] + "⟦" + ANSWER + case.end + "⟧"
    assert data.summary()["example"] == {"prompt": data.shown[0], "labels": ANSWER + case.end}
    batch = collate(data, [0])
    text = tokenizer(case.template, special=special)
    assert text.decode(batch.labels[batch.labels != IGNORE]) == ANSWER + case.end
    opening = sst.opening_weights(batch.labels, tokens=4, weight=3.0) == 3.0
    assert text.decode(batch.input_ids[(batch.labels != IGNORE) & opening]) == ANSWER[:4]
    ((_, ids, _),) = prompt_batches(data, 1)  # greedy answers begin where labels do
    assert torch.equal(ids[0], batch.input_ids[0, batch.labels[0] == IGNORE])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_asked_before_stays_whole(tmp_path, case):
    chat = [("user", "Hello there."), ("assistant", "Good day."), ("user", "How?"), ("assistant", ANSWER)]
    data = load(tmp_path, case.template, [{"messages": [{"role": r, "content": c} for r, c in chat]}], **case.options)
    assert data.shown[1] == ANSWER + case.end
    assert all(text in data.shown[0] for text in ("Hello there.", "Good day.", "How?"))


THOUGHT = {
    "qwen3": (QWEN3, "<think>\n", "Hm, no.\n</think>\n\nI can't.<|im_end|>"),
    "glm-4.5": (GLM45, "<think>", "Hm, no.</think>\nI can't."),
    "deepseek-r1": (DEEPSEEK_R1, "<｜Assistant｜><think>\n", "Hm, no.\n</think>\n\nI can't.<｜end▁of▁sentence｜>"),
    "gpt-oss": (
        GPT_OSS,
        "<|channel|>analysis<|message|>",
        "Hm, no.<|end|><|start|>assistant<|channel|>final<|message|>I can't.<|return|>",
    ),
}


@pytest.mark.parametrize("form", ["fields", "tags"])
@pytest.mark.parametrize(("template", "before", "labels"), THOUGHT.values(), ids=THOUGHT)
def test_reasoning_parts_carry_loss_and_are_said(tmp_path, template, before, labels, form):
    answer = {"role": "assistant", "content": "I can't.", "reasoning_content": "Hm, no."}
    if form == "tags":
        answer = {"role": "assistant", "content": "<think>\nHm, no.\n</think>\n\nI can't."}
    data = load(tmp_path, template, [{"messages": [{"role": "user", "content": "How?"}, answer]}, *PLAIN])
    assert data.shown[1] == labels
    assert data.shown[0].endswith(before)
    assert [e.reasoning for e in data] == [True, False]
    assert "1 of 2 answers hold a reasoning part, which carries loss" in data.notes
    assert data.summary()["reasoning"] == 1


def test_templates_that_know_no_reasoning_leave_it_in_the_answer(tmp_path):
    rows = [
        {"prompt": "How?", "response": "<think>\nHm.\n</think>\n\nNo."},
        {"prompt": "How?", "response": "<think>\n\n</think>\n\nNo."},
    ]
    data = load(tmp_path, cases.CHAT, rows)
    assert data.shown[1] == "<think>\nHm.\n</think>\n\nNo.<|end|>"
    empty = load(tmp_path, cases.CHAT, rows[1:])  # boilerplate that stands in the data
    assert empty.shown[0].endswith("assistant\n<think>\n\n</think>\n\n")
    assert empty.shown[1] == "No.<|end|>"
    fields = {"role": "assistant", "content": "No.", "reasoning": "Hm."}
    data = load(tmp_path, cases.CHAT, [{"messages": [{"role": "user", "content": "How?"}, fields]}])
    assert data.shown[0].endswith("<think>\n")
    assert data.shown[1] == "Hm.\n</think>\n\nNo.<|end|>"


def test_templates_that_drop_reasoning_are_refused_with_a_way_out(tmp_path):
    dropping = "{% for m in messages %}{{ '<' + m.role + '>' + m.content.split('</think>')[-1] }}{% endfor %}"
    with pytest.raises(
        DataError, match=r"d\.jsonl:1: the chat template leaves out the reasoning .*remove it from the data"
    ):
        load(tmp_path, dropping, [{"prompt": "How?", "response": "<think>Hm.</think>No."}])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(CASES)),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=30),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=30),
)
def test_any_answer_after_any_prompt(name, asked, answer):
    """Labels are the answer's text, but for white space that the template trims."""
    case = CASES[name]
    if not answer.strip() or "<" in answer or "[" in answer:
        return
    render = Renderer(tokenizer(case.template), case.options)
    found = render([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])
    assert found.answer.strip().startswith(answer.strip())
    assert (
        answer.strip() + case.end.strip() == found.answer.replace(" </s>", "</s>").strip()
        or found.answer == answer + case.end
    )
    assert found.prompt.endswith(case.prompt[case.prompt.find("How?") + 4 :] if "How?" in case.prompt else case.prompt)


def test_what_the_template_adds_is_said(tmp_path):
    notes = load(tmp_path, QWEN3, PLAIN).notes
    assert notes == (
        r"the chat template writes '<think>\n\n</think>\n\n' in front of answers: part of the prompt, no label",
    )
    assert load(tmp_path, QWEN3, PLAIN, enable_thinking=False).notes == ()
    (note,) = load(tmp_path, DEEPSEEK_V31, PLAIN, thinking=True).notes
    assert "opens answers with '</think>', and prompts for generation end in '<think>'" in note
    assert "{thinking: false}" in note
    assert load(tmp_path, DEEPSEEK_V31, PLAIN).notes == ()


def test_options_that_the_template_does_not_read_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="does not read 'enable_thinkin'"):
        load(tmp_path, QWEN3, PLAIN, enable_thinkin=False)
    with pytest.raises(RecipeError, match="add_generation_prompt is set by the program"):
        load(tmp_path, QWEN3, PLAIN, add_generation_prompt=False)
    with pytest.raises(RecipeError, match="no chat template that could read it"):
        load(tmp_path, None, PLAIN, enable_thinking=False)


def test_the_date_of_a_template_stands_still(tmp_path):
    first = load(tmp_path, LLAMA3, PLAIN)
    assert "Today Date: 01 Jan 2025\n" in first.shown[0]
    assert first.notes == (f"the chat template writes today's date: {TODAY} stands there (template: {{today: …}})",)
    assert "Today Date: 28 Nov 2026\n" in load(tmp_path, LLAMA3, PLAIN, today="2026-11-28").shown[0]
    assert "Today Date: 26 Jul 2024\n" in load(tmp_path, LLAMA3, PLAIN, date_string="26 Jul 2024").shown[0]
    with pytest.raises(RecipeError, match="today: expected a date"):
        load(tmp_path, LLAMA3, PLAIN, today="tomorrow")


def test_named_templates_are_chosen_by_name(tmp_path):
    named = {"rag": cases.CHAT, "tool_use": "{{ messages }}"}
    with pytest.raises(
        DataError, match=r"named rag, tool_use and none named default: .*template: \{chat_template: rag\}"
    ):
        load(tmp_path, named, PLAIN)
    assert load(tmp_path, named, PLAIN, chat_template="rag").shown[1] == ANSWER + "<|end|>"
    assert load(tmp_path, named | {"default": cases.CHAT}, PLAIN).shown[1] == ANSWER + "<|end|>"
    with pytest.raises(RecipeError, match="'rga' is no template's text"):
        load(tmp_path, named, PLAIN, chat_template="rga")
    assert load(tmp_path, cases.CHAT, PLAIN, chat_template=QWEN3).shown[1] == ANSWER + "<|im_end|>"


def test_prompts_that_change_when_an_answer_follows_are_refused(tmp_path):
    """As where the system message stands beside the last user message only while that is the last message."""
    moving = (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' %}[INST] {{ s + ' ' if s and loop.last }}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "No."},
    ]
    with pytest.raises(DataError, match=r"not a prefix .*'Be brief.* put its text into the first user message"):
        load(tmp_path, moving, [{"messages": chat}])
    assert load(tmp_path, moving, [{"messages": chat[1:]}]).shown[1] == "No.</s>"


@pytest.mark.parametrize("chat", [None, cases.CHAT])
@pytest.mark.parametrize("names", [{"eos_token": None, "pad_token": None}, {"eos_token": "", "pad_token": None}])
def test_tokenizers_without_end_or_padding(tmp_path, chat, names):
    bare = cases.tokenizer(chat)
    for name, value in names.items():
        setattr(bare, name, value)
    rows = [{"prompt": "How?", "response": "No."}, {"prompt": "How so?", "response": "No, never."}]
    data = load_dataset(cases.write_jsonl(tmp_path / "d.jsonl", rows), bare)
    batch = collate(data, [0, 1])
    assert bare.decode(batch.labels[0][batch.labels[0] != IGNORE]) == "No." + ("<|end|>" if chat else "")
    assert batch.attention_mask.sum(1).tolist() == [len(e.tokens) for e in data]
    assert [mask.sum().item() for _, _, mask in prompt_batches(data, 1)] == [e.prompt_tokens for e in data]


def test_a_space_between_prompt_and_answer_without_template_is_named(tmp_path):
    """A tokenizer that joins the space to the next word, as most do."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "Q:", "ĠA:", "Ġ", "ĠNo.", "No.", "[INST]", "Ġ[/INST]", "How?", "ĠHow?"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\S+|\s+$"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    joining = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    path = cases.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Q: A: ", "response": "No."}])
    with pytest.raises(
        DataError, match=r"d\.jsonl:1: .*ends in white space and there is no chat template .*move it into the answer"
    ):
        load_dataset(path, joining)
    cases.write_jsonl(path, [{"prompt": "Q: A:", "response": " No."}])
    assert load_dataset(path, joining)[0].tokens == (1, 2, 4)
    joining.chat_template = "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content }}{% endfor %}"
    cases.write_jsonl(path, [{"prompt": "How?", "response": "No."}])
    example = load_dataset(path, joining)[0]
    assert (example.tokens, example.prompt_tokens) == ((6, 9, 7, 4), 3)
