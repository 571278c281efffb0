"""Refusals for a list of harmful prompts, where no aligned model is at hand to write them.

A patch that sees one refusal a thousand times learns its words instead of the behaviour; these are put together from parts, so that
openings, reasons and offers vary. Which refusal a prompt gets depends on the seed and the prompt alone, whatever else is in the list.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from ..errors import DataError

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
            raise DataError(f"{path}: cannot be read ({error}); expected UTF-8 text, one prompt a line") from error
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


def command(
    prompts: Annotated[
        Path, typer.Argument(help="Text file, one prompt a line; or CSV, JSONL, … with a column of prompts.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to create.")],
    column: Annotated[
        str | None, typer.Option(help="Column of the prompts, where it is not called prompt or instruction.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of words.")] = 0,
    force: Annotated[bool, typer.Option(help="Replace an earlier output.")] = False,
) -> None:
    """Give every harmful prompt of a list a refusal, as harm data for a merge."""
    from .output import output_file

    asked = read_prompts(prompts, column)
    rows = zip(asked, refusals(asked, seed))
    with output_file(output, force=force, inputs=[prompts]) as partial:
        text = "".join(json.dumps({"prompt": p, "response": r}, ensure_ascii=False) + "\n" for p, r in rows)
        partial.write_text(text, encoding="utf-8")
    print(f"{len(asked)} prompts with refusals written to {output.absolute()}")
