"""Refusals for a list of harmful prompts: sampled from an aligned model, or put together where none is at hand.

A patch that sees one refusal a thousand times learns its words instead of the behaviour; those put together vary in openings, reasons
and offers. Which refusal a prompt gets depends on the seed and the prompt alone, whatever else is in the list.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DataError
from ..flags import Force, Json, Quiet
from ..progress import Reporter

_OPENINGS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request.",
    "I'm not able to assist with that.",
    "Sorry, but I won't help with this.",
    "I cannot assist with that.",
    "I won't provide that.",
    "I'm sorry, I can't do that.",
    "No, I can't help you with this.",
    "I must decline to answer this.",
    "That is something I cannot help with.",
    "I am unable to help with this request.",
    "I'm sorry, but this is not something I will do.",
)
_REASONS = (
    "It could cause serious harm to people.",
    "What you describe could hurt someone.",
    "Giving instructions for this would be unsafe.",
    "It would be illegal in most places, and dangerous.",
    "This could put you and others at risk.",
    "The request asks for something that is meant to do harm.",
    "I don't take part in anything that endangers others.",
    "Acting on this could have grave consequences.",
    "",
)
_OFFERS = (
    "If you are dealing with a difficult situation, I am glad to talk about safer ways through it.",
    "If there is a lawful purpose behind your question, tell me about it and I will see what I can do.",
    "I can help with related topics, such as how to stay safe.",
    "If someone is in danger, please contact your local emergency services.",
    "I'd be happy to help you with something else.",
    "Is there another question that I can help with?",
    "If you want to know how such harm is prevented, I can explain that.",
    "If you are struggling, please consider talking to somebody you trust or to a professional.",
    "",
)


def refusals(prompts: Iterable[str], seed: int = 0) -> list[str]:
    """A refusal for each prompt: the same for the same seed and prompt, found by `evaluate.is_refusal`. Prompts are not quoted in it."""
    return [_refusal(prompt, seed) for prompt in prompts]


def _refusal(prompt: str, seed: int) -> str:
    number = int.from_bytes(hashlib.sha256(f"{seed}:{prompt}".encode()).digest()[:8], "big")
    parts = []
    for choices in (_OPENINGS, _REASONS, _OFFERS):
        number, index = divmod(number, len(choices))
        parts.append(choices[index])
    return " ".join(part for part in parts if part)


def read_prompts(path: str | Path, column: str | None = None) -> list[str]:
    """Prompts of a text file, one a line, or of a data file of any kind (`files`), whose answers are left out.

    `column` names the column of the prompts where it is none of the usual. Repeated prompts count once. Raises DataError.
    """
    from .files import open_source
    from .forms import prompt_of

    columns = {"prompt": column} if column else {}
    if Path(path).suffix.lower() == ".txt":
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); expected UTF-8 text, one prompt a line"
            ) from error
        found = [line.strip() for line in lines if line.strip()]
    else:
        found = []
        for record in open_source(path).records:
            if record.error is not None:
                raise record.error
            found.append(prompt_of(record.value, record.where, columns))
    if not found:
        raise DataError(f"{path}: holds no prompts; expected one a line")
    return list(dict.fromkeys(found))


def sampled(
    prompts: Sequence[str],
    model: str,
    *,
    seed: int = 0,
    tries: int = 4,
    max_tokens: int = 128,
    device: str = "auto",
    dtype: str = "float32",
    template: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> list[str | None]:
    """An aligned model's own refusal of each prompt: the first of its answers that refuses, greedy and then drawn at temperature 1.

    None where none of `tries` answers does. Answers end at the model's end of turn, else at the last sentence within `max_tokens`. Raises
    ModelError, and DataError where its chat template refuses a prompt.
    """
    import torch

    from ..generation import greedy
    from ..judges import is_refusal
    from .chat import Renderer
    from .data import Dataset, encode, prompt_batches
    from .models import load_model

    reporter = reporter or Reporter(quiet=True)
    network, tokenizer = load_model(model, device=device, dtype=dtype)
    render = Renderer(tokenizer, template)
    turns = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": "I can't help with that."}] for p in prompts
    ]
    room = getattr(tokenizer, "model_max_length", 2**31)
    examples = [encode(t, tokenizer, room, i, f"prompt {i + 1}", render=render) for i, t in enumerate(turns)]
    ends = {e.tokens[-1] for e in examples} & set(tokenizer.all_special_ids)
    data = Dataset(tuple(examples), tokenizer.pad_token_id or 0, stops=tuple(sorted(ends)))
    found: list[str | None] = [None] * len(prompts)
    for attempt in range(tries):
        open_ones = [i for i, answer in enumerate(found) if answer is None]
        if not open_ones:
            break
        torch.manual_seed(seed + attempt)
        rest = replace(data, examples=tuple(data.examples[i] for i in open_ones))
        with greedy(network, data, tokenizer) as config, torch.inference_mode():
            config.do_sample = attempt > 0
            work = reporter.track(
                prompt_batches(rest, 16), f"refusals, try {attempt + 1}", size=lambda c: len(c[0]), unit="prompts"
            )
            for rows, ids, mask in work:
                config.max_new_tokens = max(1, min(max_tokens, room - ids.shape[1]))
                out = network.generate(
                    input_ids=ids.to(network.device), attention_mask=mask.to(network.device), generation_config=config
                )
                for row, tokens in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                    ended = any(token in (config.eos_token_id or ()) for token in tokens)
                    answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                    answer = answer if ended else _whole_sentences(answer)
                    if is_refusal(answer):
                        found[open_ones[row]] = answer
    return found


def _whole_sentences(text: str) -> str:
    """The text up to its last sentence end; all of it where there is none."""
    ends = [m.end() for m in re.finditer(r"[.!?。！？](?=\s|$)", text)]
    return text[: ends[-1]] if ends else text


def command(
    prompts: Annotated[
        Path, typer.Argument(help="Text file, one prompt a line; or CSV, JSONL, … with a column of prompts.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to create.")],
    column: Annotated[
        str | None, typer.Option(help="Column of the prompts, where it is not called prompt or instruction.")
    ] = None,
    from_model: Annotated[
        str | None,
        typer.Option(help="Aligned model that writes the refusals: a folder. Prompts that it answers are left out."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of words, or of the model's draws.")] = 0,
    device: Annotated[str, typer.Option(help="Of the model.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16.")] = "float32",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give every harmful prompt of a list a refusal, as harm data for a merge."""
    from ..recipe import spelled
    from .output import output_file

    asked = read_prompts(prompts, column)
    said: list[str | None] = list(refusals(asked, seed))
    with output_file(output, force=force, inputs=[prompts]) as partial:
        if from_model is not None:
            said = sampled(asked, from_model, seed=seed, device=device, dtype=spelled(dtype), reporter=Reporter(quiet))
        rows = [(p, r) for p, r in zip(asked, said, strict=True) if r is not None]
        if not rows:
            raise DataError(
                f"{from_model}: refused none of {len(asked)} prompts; name an aligned model, or leave out --from-model"
            )
        text = "".join(json.dumps({"prompt": p, "response": r}, ensure_ascii=False) + "\n" for p, r in rows)
        partial.write_text(text, encoding="utf-8")
    if as_json:
        facts = {"prompts": len(asked), "refused": len(rows), "output": str(output.absolute())}
        print(json.dumps(facts, ensure_ascii=False))
        return
    left = f"; {len(asked) - len(rows)} that {from_model} answered are left out" if len(rows) < len(asked) else ""
    print(f"{len(rows)} prompts with refusals written to {output.absolute()}{left}")
