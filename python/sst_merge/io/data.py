"""Prompts and answers: files in, token sequences whose answer alone carries loss, batches of similar length out.

One row is one example (`files` says what files may be, `forms` what rows):

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "response": "…"}

The last assistant message is the answer; everything before it is the prompt. `labels` are -100 on prompt and padding. What a
chat template writes in front of the answer belongs to the prompt (`chat`); that the prompt's tokens are a prefix of the whole's is
verified line by line.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .chat import Renderer
from .files import open_source
from .forms import check_columns, conversation

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One tokenised example: `tokens[:prompt_tokens]` is the prompt, the rest is the answer."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    prompt: str
    response: str
    line: int
    truncated: bool = False
    reasoning: bool = False

    @property
    def labels(self) -> int:
        return len(self.tokens) - self.prompt_tokens


@dataclass(frozen=True)
class Dataset(Sequence[Example]):
    """Tokenised examples of one file, with what a report needs to name it again."""

    examples: tuple[Example, ...]
    pad_id: int
    path: str = ""
    sha256: str = ""
    skipped: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    shown: tuple[str, str] = ("", "")  # prompt and labels of the first example, as its tokens read
    stops: tuple[int, ...] = ()  # special tokens that end an answer
    kind: str = ""  # JSONL, CSV, …, and the forms of the rows

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:  # an Example, or for slices a Dataset
        if isinstance(index, slice):
            return replace(self, examples=self.examples[index])
        return self.examples[index]

    @property
    def example(self) -> dict[str, str]:
        """The first example as the model sees it: the prompt's text and the labels'."""
        return {"prompt": self.shown[0], "labels": self.shown[1]}

    def summary(self) -> dict[str, Any]:
        """What reports record: path, hash, counts, how many answers were truncated or hold reasoning, and one example as rendered."""
        return {
            "path": self.path,
            "sha256": self.sha256,
            "kind": self.kind,
            "sequences": len(self),
            "tokens": sum(len(e.tokens) for e in self.examples),
            "labels": sum(e.labels for e in self.examples),
            "truncated": sum(e.truncated for e in self.examples),
            "reasoning": sum(e.reasoning for e in self.examples),
            "skipped_lines": list(self.skipped),
            "notes": list(self.notes),
            "example": self.example,
        }


@dataclass
class Batch:
    """Right-padded tensors [N, T] and the positions of their rows in the dataset."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: list[int] = field(default_factory=list)

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """Keyword arguments of a causal LM's forward, on `device`."""
        names = ("input_ids", "attention_mask", "labels")
        return {name: getattr(self, name).to(device) for name in names}


def load_dataset(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    limit: int | None = None,
    skip_bad_lines: bool = False,
    template: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """Read and tokenise a data file.

    Args:
        path: UTF-8 JSONL (empty lines are skipped), a JSON array, CSV, TSV or parquet, each of them gzipped or not, or a folder (see `files`).
        tokenizer: its chat template is applied; without one, `prompt` and `response` are joined as plain text.
        max_length: longer sequences lose the end of their answer, which `Dataset.summary` counts; never more than the
            tokenizer's `model_max_length`, which `load_model` sets to the model's context.
        limit: only the first `limit` examples.
        skip_bad_lines: leave out lines that are no such example; `Dataset.skipped` has their numbers.
        template: options of the chat template (see `chat.Renderer`).
        columns: what fields are called in this file, as in `{"prompt": "question", "response": "answer"}`; rows without these columns
            are read as they are.

    Raises:
        DataError: naming file and line, for anything that is not such an example, and for prompts that leave no room
            for an answer.
        RecipeError: for options that the chat template does not have, and columns of no field.
    """
    columns, render, source = check_columns(columns), Renderer(tokenizer, template), open_source(path)
    room = min(max_length, getattr(tokenizer, "model_max_length", max_length))
    examples: list[Example] = []
    skipped: list[int] = []
    forms: Counter[str] = Counter()
    for record in source.records:
        if limit is not None and len(examples) == limit:
            break
        try:
            if record.error is not None:
                raise record.error
            form, messages = conversation(record.value, record.where, columns)
            examples.append(encode(messages, tokenizer, room, record.number, record.where, render=render))
        except DataError:
            if not skip_bad_lines:
                raise
            skipped.append(record.number)
        else:
            forms[form] += 1
    if not examples:
        raise DataError(
            f"{path}: holds no examples; expected one JSON object per line, or the rows of an array or table"
        )
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ends = {e.tokens[-1] for e in examples if not e.truncated}
    return Dataset(
        tuple(examples),
        _pad_id(tokenizer),
        source.path,
        source.sha256,
        tuple(skipped),
        _notes(examples, render),
        _shown(examples[0], tokenizer),
        tuple(sorted(ends & special)),
        f"{source.kind}: {', '.join(f'{n} × {form}' for form, n in forms.items())}",
    )


def rendered_example(data: Dataset, *, marks: tuple[str, str] = ("⟦", "⟧")) -> str:
    """The first example as the model sees it, special tokens and all, its labels between `marks`."""
    prompt, labels = data.shown
    return f"{prompt}{marks[0]}{labels}{marks[1]}"


def encode(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    max_length: int,
    line: int = 0,
    where: str = "",
    *,
    render: Renderer | None = None,
) -> Example:
    """Tokenise one conversation whose last message is the answer. Raises DataError as `load_dataset` does."""
    rendered = (render or Renderer(tokenizer))(messages, where)
    tokens = _ids(tokenizer, rendered.prompt + rendered.answer)
    # Some templates write a space in front of the answer, which tokenizers join to its first word: it then is a label.
    starts = [rendered.prompt]
    if rendered.templated:
        starts += [rendered.prompt.rstrip(" "), rendered.prompt.rstrip()]
    prefixes = (_ids(tokenizer, text) for text in dict.fromkeys(starts))
    prefix = next((ids for ids in prefixes if tokens[: len(ids)] == ids), None)
    if prefix is None:
        raise DataError(f"{where}: {_joined_tokens(rendered.prompt, rendered.templated)}")
    if len(prefix) >= max_length:
        raise DataError(
            f"{where}: the prompt alone has {len(prefix)} tokens and sequences may have {max_length} (the lesser of max_length and "
            "the model's context); raise max_length or remove the line"
        )
    if len(tokens) == len(prefix):
        raise DataError(f"{where}: the answer is empty, so there is nothing to learn from; remove the line")
    return Example(
        tuple(tokens[:max_length]),
        len(prefix),
        prompt=next((m["content"] for m in reversed(messages[:-1]) if m["role"] == "user"), ""),
        response=messages[-1]["content"],
        line=line,
        truncated=len(tokens) > max_length,
        reasoning=rendered.reasoning,
    )


def batches(data: Dataset, tokens_per_batch: int = 1024, *, seed: int | None = None) -> list[Batch]:
    """Right-padded batches of examples of similar length, at most `tokens_per_batch` tokens each, padding included.

    An example longer than the budget is a batch of its own. With `seed` the order of batches is shuffled (training);
    without, the longest come first, so that a batch that does not fit in memory fails at the start of a run.
    """
    order = sorted(range(len(data)), key=lambda i: (-len(data[i].tokens), i))
    groups: list[list[int]] = []
    for i in order:
        width = len(data[groups[-1][0]].tokens) if groups else math.inf
        if groups and width * (len(groups[-1]) + 1) <= tokens_per_batch:
            groups[-1].append(i)
        else:
            groups.append([i])
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    return [collate(data, rows) for rows in groups]


def collate(data: Dataset, rows: Sequence[int]) -> Batch:
    """One right-padded batch of the given rows."""
    examples = [data[i] for i in rows]
    shape = (len(examples), max(len(e.tokens) for e in examples))
    ids, mask, labels = torch.full(shape, data.pad_id), torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
    for n, example in enumerate(examples):
        length = len(example.tokens)
        ids[n, :length] = torch.tensor(example.tokens)
        mask[n, :length] = 1
        labels[n, example.prompt_tokens : length] = ids[n, example.prompt_tokens : length]
    return Batch(ids, mask, labels, list(rows))


def prompt_batches(data: Dataset, per_batch: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Left-padded prompts for generation: rows, input_ids [N, T], attention_mask [N, T]."""
    order = sorted(range(len(data)), key=lambda i: (data[i].prompt_tokens, i))
    for start in range(0, len(order), per_batch):
        rows = order[start : start + per_batch]
        width = max(data[i].prompt_tokens for i in rows)
        ids, mask = torch.full((len(rows), width), data.pad_id), torch.zeros(len(rows), width, dtype=torch.long)
        for n, i in enumerate(rows):
            prompt = data[i].tokens[: data[i].prompt_tokens]
            ids[n, width - len(prompt) :] = torch.tensor(prompt)
            mask[n, width - len(prompt) :] = 1
        yield rows, ids, mask


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _joined_tokens(prompt: str, templated: bool) -> str:
    cause = "the tokenizer joins the end of the prompt and the beginning of the answer, so that the answer cannot be told apart; "
    if templated:
        return f"{cause}begin the answer with another character (the prompt ends in {prompt[-12:]!r})"
    if prompt != prompt.rstrip():
        return f"{cause}the prompt ends in white space and there is no chat template that would part them: move it into the answer"
    return f"{cause}there is no chat template that would part them: begin the answer with a space or a line end"


def _pad_id(tokenizer: Any) -> int:
    """Any token serves as padding, since the attention mask hides it."""
    ids = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    return next((i for i in ids if isinstance(i, int)), 0)


def _shown(example: Example, tokenizer: Any) -> tuple[str, str]:
    def read(tokens: Sequence[int]) -> str:
        return tokenizer.decode(list(tokens), skip_special_tokens=False)

    return read(example.tokens[: example.prompt_tokens]), read(example.tokens[example.prompt_tokens :])


def _notes(examples: Sequence[Example], render: Renderer) -> tuple[str, ...]:
    thoughtful = sum(e.reasoning for e in examples)
    marks = [m for m in render.special if any(m in e.prompt for e in examples)] if render.source is not None else []
    if marks:
        share = sum(any(m in e.prompt for m in marks) for e in examples) / len(examples)
        render.notes[
            f"{share:.0%} of the prompts hold {marks[0]!r}, which the tokenizer reads as a special token: are they rendered already? The chat "
            "template renders them once more; give messages, or plain prompts"
        ] = None
    said = [f"{thoughtful} of {len(examples)} answers hold a reasoning part, which carries loss"] if thoughtful else []
    return (*render.notes, *said)
