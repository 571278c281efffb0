"""Conversations as the text that a model sees: the prompt, and the answer that alone carries loss.

A chat template writes more than it is given: headers, an empty think block, a channel, an end of turn. What it writes in front of the
answer belongs to the prompt, and generation starts behind it; behind the answer only its end of turn (the first marker) is a label, since
that is how the model stops. Where the answer lies is found by rendering the conversation once more with a placeholder in its place,
so that templates need no `{% generation %}` marks, may trim the answer, and may ignore `add_generation_prompt`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from ..errors import DataError, RecipeError

TODAY = "2025-01-01"  # the date in prompts of templates that write one, so that a run can be repeated and resumed
REASONING = ("reasoning_content", "reasoning", "thinking")  # names that templates read the reasoning part under
_OURS = ("chat_template", "today")
_SET_BY_US = (
    "messages",
    "conversation",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "tools",
    "strftime_now",
)
_THINK = re.compile(r"(?:\s*<think>)?(?P<reasoning>.*?)</think>\s*(?P<answer>.*)", re.DOTALL)
_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_MARKER = r"<[^<>\s]+>|\[/?[A-Z_]+\]"
_DIRECTIVES = (*"aAbBdejmyYGgUVWuwHIMSpfZzcxXDFTR", "-d", "-m", "-H", "-I", "-j")


@dataclass(frozen=True)
class Rendered:
    """One conversation as text: `prompt + answer` is what the model sees, `answer` carries the loss."""

    prompt: str
    answer: str
    templated: bool = True
    reasoning: bool = False


class Renderer:
    """A tokenizer's chat template with fixed options, or plain joining where it has none.

    Args:
        tokenizer: with `chat_template` (a text, or several by name) and `apply_chat_template`.
        options: variables of the template (`{"enable_thinking": False}`), and two of ours: `chat_template`, the name of one of several
            templates or a template's text, and `today` (ISO date, default `TODAY`) for templates that write the date.

    Raises:
        RecipeError: options that the template does not read, or that are not the user's to set; a date that is none.
        DataError: several templates by name, none of them chosen and none called "default".
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None):
        self.tokenizer, options = tokenizer, dict(options or {})
        self.source = _source(tokenizer, options.pop("chat_template", None))
        self.today = str(options.pop("today", TODAY))
        _check_options(self.source, options)
        self.options = options
        self.dated = self.source is not None and "strftime_now" in self.source
        self.parts: bool | None = (
            None  # whether the template wants content as [{"type": "text", "text": …}]; None: not known yet
        )
        self.notes: dict[str, None] = {}  # remarks in order, each once
        self._text = None if self.source is None else _with_date(self.source, self.today)
        special = [t for t in getattr(tokenizer, "all_special_tokens", ()) if t and t.strip()]
        self.special = tuple(special)
        special += [str(t) for t in getattr(tokenizer, "get_added_vocab", dict)() if str(t).strip()]
        names = "|".join(re.escape(t) for t in sorted(set(special), key=len, reverse=True))
        self._end = re.compile(rf"\s*(?:{names + '|' if names else ''}{_MARKER})")
        if self.dated:
            self.notes[f"the chat template writes today's date: {self.today} stands there (template: {{today: …}})"] = (
                None
            )

    def __call__(self, messages: Sequence[Mapping[str, Any]], where: str = "") -> Rendered:
        """Prompt and answer of a conversation whose last message is the answer. DataError names what a template cannot do."""
        if self._text is None:
            return self._joined(messages, where)
        if self.parts is None:
            self.parts = self._wants_parts(messages, where)
        answer = messages[-1]["content"]
        thought, said = _parts(messages[-1])
        if thought:
            before, middle, after = self._reasoned(messages, thought, said, where)
        else:
            before, after = self._around(messages, where)
            middle = _between(self._render(messages, where), before, after) or ""
            if (block := _EMPTY_THINK.match(middle)) and middle.strip() == answer.strip():
                before, middle = before + block[0], middle[block.end() :]  # in the data, where the template writes none
            if not middle:
                raise DataError(
                    f"{where}: the chat template writes other text around this answer than around another, so the answer cannot be "
                    "told apart; change the answer, or choose another template (template: {chat_template: …})"
                )
        if not middle.strip():
            raise DataError(f"{where}: the answer is empty but for its reasoning; remove the line")
        self._check_prompt(messages, before, where)
        end = self._end.match(after)
        if end and (mark := end[0].strip()) and middle.rstrip().endswith(mark):
            middle = middle.rstrip().removesuffix(mark)
            self.notes[
                f"answers end in {mark!r} in the data, and the chat template writes it, too: it stands there once"
            ] = None
        return Rendered(before, middle + (end[0] if end else ""), reasoning=bool(thought))

    def user_turn(self) -> tuple[str, str]:
        """What the template writes in front of a user's first words, and the mark that ends them: for a model that fills the turn itself.

        Raises DataError without a chat template, and for one that writes no user's turn or ends it by no mark.
        """
        if self.source is None:
            raise DataError("this tokenizer has no chat template, so there is no user's turn that the model could fill")
        probe = "XquestionX"
        messages = [{"role": "user", "content": probe}, {"role": "assistant", "content": "XanswerX"}]
        if self.parts is None:
            self.parts = self._wants_parts(messages, "")
        text = self._render(messages[:1], "the empty user's turn")
        before, found, after = text.partition(probe)
        end = self._end.match(after)
        if not found or end is None:
            raise DataError(f"the chat template writes {text[:60]!r} for a user's turn, whose end cannot be told")
        return before, end[0].strip()

    def _wants_parts(self, messages: Sequence[Mapping[str, Any]], where: str) -> bool:
        """Templates of models that see images may write nothing of a plain string, and all of a list of parts."""
        for parts in (False, True):
            self.parts = parts
            with contextlib.suppress(DataError):
                self._around(messages, where)
                return parts
        return False

    def _render(self, messages: Sequence[Mapping[str, Any]], where: str, **more: Any) -> str:
        if self.parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, chat_template=self._text, **self.options, **more
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            hint = ""
            if "system" in str(error).lower() and any(m["role"] == "system" for m in messages):
                hint = "; put the text of the system message into the first user message"
            raise DataError(f"{where}: the model's chat template refuses these messages: {error}{hint}") from error

    def _around(self, messages: Sequence[Mapping[str, Any]], where: str) -> tuple[str, str]:
        """What the template writes before and behind an answer without reasoning."""
        probe = _probe(messages, "answer")
        plain = {key: value for key, value in messages[-1].items() if key not in REASONING}
        text = self._render([*messages[:-1], {**plain, "content": probe}], where)
        if text.count(probe) != 1:
            raise DataError(
                f"{where}: the chat template writes the answer {text.count(probe)} times, expected once"
                + (", so that as rendered the answer is empty" if probe not in text else "")
                + "; choose another template (template: {chat_template: …})"
            )
        before, after = text.split(probe)
        return before, after

    def _reasoned(
        self, messages: Sequence[Mapping[str, Any]], thought: str, said: str, where: str
    ) -> tuple[str, str, str]:
        """Before, labels and behind of an answer with a reasoning part, in the first form that the template keeps whole."""
        probes = _probe(messages, "thought"), _probe(messages, "answer")
        rest = {key: value for key, value in messages[-1].items() if key not in REASONING}
        given = any(messages[-1].get(name) for name in REASONING)

        def fields(thought: str, said: str) -> dict[str, Any]:
            return {**rest, **dict.fromkeys(REASONING, thought), "content": said}

        def tags(thought: str, said: str) -> dict[str, Any]:
            return {**rest, "content": f"<think>\n{thought}\n</think>\n\n{said}"}

        for form in (fields, None, tags):
            try:
                if form is None and not given:  # as it stands in the data, where the template leaves that alone
                    before, after = self._around(messages, where)
                    middle = _between(self._render(messages, where), before, after)
                    if middle is not None and middle.strip() == messages[-1]["content"].strip():
                        return before, middle, after
                elif form is not None:
                    text = self._render([*messages[:-1], form(*probes)], where)
                    if any(text.count(probe) != 1 for probe in probes) or text.index(probes[0]) > text.index(probes[1]):
                        continue
                    before, after = text.split(probes[0])[0], text.split(probes[1])[1]
                    middle = _between(self._render([*messages[:-1], form(thought, said)], where), before, after)
                    if middle is not None and thought.strip() in middle and said.strip() in middle:
                        return before, middle, after
            except DataError:  # a template that raises on tags, as that of gpt-oss does
                continue
        prompt = self._render(messages[:-1], where, add_generation_prompt=True)
        if not prompt.rstrip().endswith("<think>"):
            raise DataError(
                f"{where}: the chat template leaves out the reasoning of this answer; remove it from the data, or choose a template that "
                "writes it (template: {chat_template: …}, or an option of the template such as enable_thinking: true)"
            )
        _, after = self._around(messages, where)
        return prompt, f"{thought}\n</think>\n\n{said}", after

    def _check_prompt(self, messages: Sequence[Mapping[str, Any]], before: str, where: str) -> None:
        """The prompt in front of an answer must be what a server renders, but for the last words of the assistant's header."""
        served = self._render(messages[:-1], where, add_generation_prompt=True)
        if before.startswith(served):
            if (written := before[len(served) :]).strip():
                self.notes[
                    f"the chat template writes {written!r} in front of answers: part of the prompt, no label"
                ] = None
            return
        common = before[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, served)))]
        if common.rfind("<") > common.rfind(">"):  # not within a marker
            common = common[: common.rfind("<")]
        asked = str(messages[-2]["content"]).strip()
        if not before.startswith(self._render(messages[:-1], where)) and asked not in common:
            raise DataError(
                f"{where}: the chat template writes the prompt otherwise when an answer follows, so that the tokens of the prompt are not "
                f"a prefix of those of prompt and answer; it differs from {served[len(common) :][:40]!r} on. If a system message is what "
                "moves, put its text into the first user message; else choose another template (template: {chat_template: …})"
            )
        self.notes[
            f"the chat template opens answers with {before[len(common) :]!r}, and prompts for generation end in "
            f"{served[len(common) :]!r}: the former is used; where that is not how the model will be asked, set the template's option for it "
            "(template: {enable_thinking: false}, {thinking: false}, …) or give answers with their reasoning"
        ] = None

    def _joined(self, messages: Sequence[Mapping[str, Any]], where: str) -> Rendered:
        if len(messages) != 2:
            raise DataError(
                f"{where}: this tokenizer has no chat template, so only one prompt and one response can be joined"
            )
        self.notes["the tokenizer has no chat template: prompt and answer are joined as plain text"] = None
        (asked, said), bos, eos = (
            (m["content"] for m in messages),
            self.tokenizer.bos_token or "",
            self.tokenizer.eos_token or "",
        )
        asked = asked if bos and asked.startswith(bos) else bos + asked
        return Rendered(asked, said if eos and said.endswith(eos) else said + eos, templated=False)


def _source(tokenizer: Any, chosen: str | None) -> str | None:
    """The template's text. RecipeError for a name that is none, DataError where a name must be given."""
    own = getattr(tokenizer, "chat_template", None) or None
    if chosen is not None and not isinstance(chosen, str):
        raise RecipeError(f"template: chat_template: expected a name or a template's text, got {chosen!r}")
    if isinstance(own, Mapping):
        if chosen is None and "default" not in own:
            raise DataError(
                f"this tokenizer has chat templates named {', '.join(sorted(own))} and none named default: choose one with "
                f"template: {{chat_template: {sorted(own)[0]}}}"
            )
        if chosen is None or chosen in own:
            return own[chosen or "default"]
    if chosen is not None and "{" not in chosen:
        names = f"named {', '.join(sorted(own))}" if isinstance(own, Mapping) else "without names"
        raise RecipeError(
            f"template: chat_template: {chosen!r} is no template's text, and this tokenizer's are {names}"
        )
    return chosen if chosen is not None else own


def _check_options(source: str | None, options: Mapping[str, Any]) -> None:
    for name in options:
        if name in _SET_BY_US:
            raise RecipeError(f"template: {name} is set by the program; give variables of the chat template")
        if source is None:
            raise RecipeError(f"template: {name}: this tokenizer has no chat template that could read it")
        if not re.search(rf"\b{re.escape(str(name))}\b", source):
            raise RecipeError(
                f"template: the chat template of this model does not read {name!r}; see its chat_template for what it does"
            )


def _with_date(source: str, today: str) -> str:
    """The template with its clock stopped: a macro hides the function `strftime_now` of transformers, which cannot be passed a date."""
    if "strftime_now" not in source:
        return source
    try:
        date = datetime.datetime.combine(datetime.date.fromisoformat(today), datetime.time(12))
    except ValueError as error:
        raise RecipeError(f"template: today: expected a date such as {TODAY}, got {today!r}") from error
    steps = "".join(f" | replace('%{d}', {json.dumps(date.strftime('%' + d))})" for d in _DIRECTIVES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{steps} }}}}{{%- endmacro -%}}{source}"


def _parts(message: Mapping[str, Any]) -> tuple[str, str]:
    """Reasoning and answer of a message, by field or by `<think>` tags; the reasoning is "" where there is none."""
    content = message["content"]
    if given := next((m for name in REASONING if isinstance(m := message.get(name), str) and m.strip()), ""):
        return given.strip("\n"), content.lstrip("\n")
    found = _THINK.fullmatch(content)
    if found is None or not found["reasoning"].strip():
        return "", content
    return found["reasoning"].strip("\n"), found["answer"]


def _between(full: str, before: str, after: str) -> str | None:
    if len(full) < len(before) + len(after) or not (full.startswith(before) and full.endswith(after)):
        return None
    return full[len(before) : len(full) - len(after)]


def _probe(messages: Sequence[Mapping[str, Any]], word: str) -> str:
    """Letters that no message holds."""
    probe, text = f"Xq{word}qX", repr(messages)
    while probe in text:
        probe = f"X{probe}X"
    return probe
