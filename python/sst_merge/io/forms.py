"""Records of the forms that people's data have, as conversations whose last message is the answer.

| form | fields |
| --- | --- |
| messages | `messages`: role and content (text, or parts of type text) |
| conversations | `conversations`: from and value (ShareGPT), or role and content; `system` where there is one |
| prompt/response, prompt/completion | texts, or lists of messages (TRL) |
| instruction/output | `instruction`, `input` (may be empty or missing), `output` (Alpaca); `system` where there is one |

Fields of other names are told by `columns`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from ..errors import DataError, RecipeError

FIELDS = ("messages", "conversations", "prompt", "response", "completion", "instruction", "input", "output", "system")
_ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "ai": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """The columns by field. RecipeError for fields that are none."""
    for name, column in (columns or {}).items():
        if name not in FIELDS or not isinstance(column, str):
            raise RecipeError(f"columns: expected names of columns under {', '.join(FIELDS)}, got {name}: {column!r}")
    return dict(columns or {})


def conversation(record: Any, where: str, columns: Mapping[str, str]) -> tuple[str, list[dict[str, Any]]]:
    """The form of a record and its messages. DataError for what has none of the forms, or no answer at its end."""
    if isinstance(record, Mapping) and columns and all(column in record for column in columns.values()):
        record = {name: record[column] for name, column in columns.items()}
    form, messages = _messages(record, where)
    if isinstance(messages, str):  # of a table whose cells hold JSON
        with contextlib.suppress(ValueError, RecursionError):
            messages = json.loads(messages)
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{where}: expected two or more messages with text in role and content, the assistant's last")
    messages = [_message(m) for m in messages]
    _refuse_by_name(messages, where)
    valid = all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages)
    if not valid or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: expected two or more messages with text in role and content, the assistant's last")
    if not messages[-1]["content"].strip():
        raise DataError(f"{where}: the answer is empty, so there is nothing to learn from; remove the line")
    if any(not _encodable(text) for m in messages for text in m.values() if isinstance(text, str)):
        raise DataError(f"{where}: the text holds a lone surrogate, which is no Unicode character and has no UTF-8")
    return form, messages


def _refuse_by_name(messages: list[dict[str, Any]], where: str) -> None:
    """DataError for rows that are conversations, and hold what cannot be learnt from here."""
    if not messages:
        return
    kinds = {
        p.get("type")
        for m in messages
        if isinstance(m.get("content"), list)
        for p in m["content"]
        if isinstance(p, dict)
    }
    if other := sorted(str(kind) for kind in kinds - {"text"}):
        raise DataError(
            f"{where}: expected messages with text in role and content, one has parts of type {', '.join(other)}; remove the line"
        )
    last = messages[-1]
    if last.get("role") == "user":
        raise DataError(
            f"{where}: expected two or more messages, the assistant's last; the last message is the user's, remove it or the line"
        )
    if last.get("tool_calls") and not last.get("content"):
        raise DataError(f"{where}: the last answer is a call of a tool, without text to learn from; remove the line")
    if any(last.get(mark) in (0, False) for mark in ("weight", "train", "trainable", "loss_mask") if mark in last):
        raise DataError(
            f"{where}: the last answer is marked as not to be learnt (weight: 0, train: false or the like); remove the line or the mark"
        )


def prompt_of(record: Any, where: str, columns: Mapping[str, str]) -> str:
    """The last thing that the user says in a record, which needs no answer. DataError where there is nothing."""
    text = record
    if isinstance(record, Mapping):
        names = (columns.get("prompt"), "prompt", "instruction")
        turns = [record.get("messages"), record.get("conversations"), record.get("prompt")]
        said = [_message(m) for m in next((t for t in turns if isinstance(t, list)), []) if isinstance(m, dict)]
        asked = [m.get("content") for m in said if m.get("role") == "user"]
        text = next(
            (record[n] for n in names if n in record and isinstance(record[n], str)), asked[-1] if asked else None
        )
    if isinstance(text, str) and text.strip() and _encodable(text):
        return text
    found = (
        f"an object with {sorted(map(str, record))}" if isinstance(record, Mapping) else f"a {type(record).__name__}"
    )
    raise DataError(
        f"{where}: expected a prompt: a line of text, or an object with prompt, instruction, messages or conversations, got {found}; for another "
        "name say which column it is (--column)"
    )


def _messages(record: Any, where: str) -> tuple[str, Any]:
    found = f"a {type(record).__name__}"
    if isinstance(record, Mapping):
        if record.get("messages") is not None:
            return "messages", record["messages"]
        if record.get("conversations") is not None:
            return "conversations", _with_system(record, record["conversations"])
        for answer in ("response", "completion"):
            if record.get("prompt") is not None and record.get(answer) is not None:
                prompt, said = record["prompt"], record[answer]
                turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
                turns = turns + (said if isinstance(said, list) else [{"role": "assistant", "content": said}])
                return f"prompt/{answer}", _with_system(record, turns)
        if record.get("instruction") is not None and record.get("output") is not None:
            asked, more = record["instruction"], record.get("input")
            if isinstance(asked, str) and isinstance(more, str) and more.strip():
                asked = f"{asked}\n\n{more}"
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
            return "instruction/output", _with_system(record, turns)
        found = f"an object with {sorted(map(str, record))}"
        if set(record) == {"text"}:
            raise DataError(
                f"{where}: a text alone does not say where its answer begins; give prompt and response, or messages"
            )
    raise DataError(
        f'{where}: expected an object with "messages", "conversations", "prompt" and "response" (or "completion"), or "instruction" and '
        f'"output", got {found}; for other names say which column is what, as in columns: {{prompt: question, response: answer}}, or {{messages: chosen}} for preferences'
    )


def _with_system(record: Mapping[str, Any], turns: Any) -> Any:
    system = record.get("system")
    if not isinstance(turns, list) or not isinstance(system, str) or not system.strip():
        return turns
    return [{"role": "system", "content": system}, *turns]


def _message(given: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    if "content" not in message and message.get("tool_calls"):
        message["content"] = ""  # a call of a tool, which templates write
    role = message.get("role")
    if isinstance(role, str):
        message["role"] = _ROLES.get(role, role)
    parts = message.get("content")
    if isinstance(parts, list) and parts and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        message["content"] = "".join(p["text"] for p in parts)
    return message


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
