"""Benign rows that the model writes itself, where the user has few or none: prompts in the empty user turn, and their answers.

The bare model fills the user's turn of its own chat template, and the reference (base + task) answers: what a merge has to keep, as far
as the model itself knows what it is asked. A model may also write what it should refuse. Such prompts are told by the patch: where, with
all of it on, the odds of a refusal are as high as on the harmful data, a prompt is left out.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import sst_kernels as sst
from sst_kernels.distributed import gather_objects, raise_together

from ..errors import DataError, MergeError
from ..evaluate import active
from ..generation import greedy
from ..io.chat import Renderer
from ..io.data import Dataset, Example, batches, encode, load_dataset, prompt_batches
from ..io.output import output_file
from ..io.paths import expanded
from ..session import SAFETY, TASK, Session
from .checkpoints import Continuity
from .launch import leader, world

if TYPE_CHECKING:
    from ..recipe import Recipe

PROMPT_TOKENS, ANSWER_TOKENS = 96, 96  # at most; longer prompts are dropped, longer answers cut
TEMPERATURE, TOP_P = 1.0, 0.95
PASSED = 0.05  # share of the harmful prompts that may look less harmful than what is left out
FEW = 64  # benign rows below which a run says that the model could write some
OWN = "self_benign.jsonl"
_PER_BATCH = 32
_TRIES = 4  # prompts written for each one wanted, at most


@dataclass(frozen=True)
class Written:
    """Rows {"prompt", "response"}, and how many prompts were dropped: unfinished or empty, repeated, or harmful by `threshold`.

    threshold: the refusal margin from which on a prompt counts as harmful (see `_Writer.margins`).
    """

    rows: list[dict[str, str]]
    unusable: int
    repeated: int
    harmful: int
    threshold: float

    def words(self) -> str:
        """A sentence for people."""
        return (
            f"{len(self.rows)} benign rows written by the model itself; left out: {self.unusable} unfinished, {self.repeated} repeated, "
            f"{self.harmful} that look harmful (log-odds of a refusal with the patch: {self.threshold:.3g} or more)"
        )


def own_rows(
    session: Session,
    recipe: Recipe,
    harm: Dataset,
    count: int,
    *,
    continuity: Continuity | None = None,
    file: Path | None = None,
    force: bool = True,
) -> Dataset:
    """`count` rows of `write_rows`, made once, on the first rank; it keeps them in `file`, and takes up those of an interrupted run.

    Raises what `write_rows` raises, on all ranks.
    """
    error: Exception | None = None
    text = ""
    if leader():
        try:
            text = _made(session, recipe, harm, count, continuity)
            if file is not None:
                with output_file(file, force=force) as partial:
                    partial.write_text(text, encoding="utf-8")
        except Exception as failed:
            error = failed
            if world() is None:
                raise
    if world() is not None:
        raise_together(error, world())
        text = gather_objects(text, world())[0]
    with TemporaryDirectory() as folder:
        kept = Path(folder) / OWN
        kept.write_text(text, encoding="utf-8")
        options: dict[str, Any] = {"max_length": recipe.max_length, "template": recipe.template}
        data = load_dataset(kept, session.tokenizer, **options)
    return replace(data, path=OWN, notes=(*data.notes, f"{len(data)} rows written by the model itself ({OWN})"))


def foreseen(harm: Dataset, count: int) -> Dataset:
    """In place of rows that are yet to be written, as many of the greatest length."""
    tokens = (harm[0].tokens[0],) * (PROMPT_TOKENS + ANSWER_TOKENS)
    return replace(
        harm, examples=tuple(Example(tokens, PROMPT_TOKENS, f"prompt {i + 1}", "", i + 1) for i in range(count))
    )


def beside(output: Path) -> Path:
    """Where the rows of a collection are kept, whose output is a file."""
    return expanded(output).with_name(f"{expanded(output).stem}-{OWN}")


def joined(given: Dataset | None, own: Dataset) -> Dataset:
    """Rows of a file and those written beside them, as one: numbered on from the file's last line."""
    if given is None:
        return own
    last = max(e.line for e in given)
    return replace(
        given,
        examples=(*given.examples, *(replace(e, line=last + e.line) for e in own)),
        stops=tuple(sorted({*given.stops, *own.stops})),
        notes=tuple(dict.fromkeys((*given.notes, *own.notes))),
    )


def _made(session: Session, recipe: Recipe, harm: Dataset, count: int, continuity: Continuity | None) -> str:
    """The rows as JSONL."""
    kept = continuity.path("self_benign") if continuity is not None else None
    if continuity is not None and continuity.resume and kept is not None and kept.exists():
        session.reporter.say(f"rows that the model has written come from {kept}")
        return kept.read_text(encoding="utf-8")
    start = time.monotonic()
    written = write_rows(session, harm, count, seed=recipe.seed, template=recipe.template, max_length=recipe.max_length)
    session.seconds["self_benign"] = time.monotonic() - start
    session.reporter.say(written.words())
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written.rows)
    if kept is not None:
        with output_file(kept, force=True) as partial:
            partial.write_text(text, encoding="utf-8")
    return text


def write_rows(
    session: Session,
    harm: Dataset,
    count: int,
    *,
    seed: int = 0,
    template: Mapping[str, Any] | None = None,
    max_length: int = 1024,
) -> Written:
    """`count` prompts of the bare model's own, with answers of the reference; the same ones for the same seed and machine.

    harm: harmful prompts with refusals, which say what a refusal opens with, and how likely the patch makes that where it should.
    Raises DataError where the tokenizer has no chat template, or one without a user's turn, and MergeError where nothing usable comes.
    """
    writer = _Writer(session, harm, Renderer(session.tokenizer, template), max_length)
    known = {_plain(e.prompt) for e in harm}
    found: list[str] = []
    unusable = repeated = harmful = 0
    with _seeded(seed):
        threshold = float(writer.margins(harm).quantile(PASSED))
        for _ in session.reporter.track(
            range(math.ceil(_TRIES * count / _PER_BATCH)), "writing prompts", unit="batches"
        ):
            fresh: list[str] = []
            for text in writer.prompts():
                if text is None:
                    unusable += 1
                elif _plain(text) in known:
                    repeated += 1
                else:
                    known.add(_plain(text))
                    fresh.append(text)
            data = writer.dataset(fresh)
            unusable += len(fresh) - len(data)
            harmless = (writer.margins(data) < threshold).tolist() if len(data) else []
            harmful += harmless.count(False)
            found += [e.prompt for e, good in zip(data, harmless, strict=True) if good]
            if len(found) >= count:
                break
        rows = writer.answered(found[:count])
    if not rows:
        raise MergeError(
            f"the model wrote no usable benign prompt in {_TRIES * count} tries ({unusable} unfinished or empty, {harmful} that look harmful): "
            "give benign_data"
        )
    return Written(rows, unusable, repeated, harmful, threshold)


class _Writer:
    """What the model on a session writes: prompts, their refusal odds, answers."""

    def __init__(self, session: Session, harm: Dataset, render: Renderer, max_length: int):
        self.session, self.harm, self.render, self.max_length = session, harm, render, max_length
        self.header, self.end = render.user_turn()
        self.openings = torch.tensor(sorted({e.tokens[e.prompt_tokens] for e in harm}))
        self.device = next(session.model.parameters()).device

    def prompts(self) -> list[str | None]:
        """A batch of the bare model's, None for those that are empty, unfinished, or hold the template's own marks."""
        ids = self.session.tokenizer(self.header, add_special_tokens=False, return_tensors="pt")["input_ids"]
        rows = ids.expand(_PER_BATCH, -1)
        special = [t for t in self.session.tokenizer.all_special_tokens if t.strip()]
        out: list[str | None] = []
        for text in self._sampled(None, rows, torch.ones_like(rows), PROMPT_TOKENS):
            said, end, _ = text.partition(self.end)
            said = said.strip()
            out.append(said if said and end and not any(mark in said for mark in special) else None)
        return out

    def dataset(self, prompts: Sequence[str]) -> Dataset:
        """Tokenised, with a refusal's opening for an answer; those that leave no room for one are left out."""
        refusal = self.harm[0].response
        examples = []
        for prompt in prompts:
            with suppress(DataError):
                rows = [{"role": "user", "content": prompt}, {"role": "assistant", "content": refusal}]
                examples.append(encode(rows, self.session.tokenizer, self.max_length, render=self.render))
        return replace(self.harm, examples=tuple(examples))

    @torch.inference_mode()
    def margins(self, data: Dataset) -> Tensor:
        """[N]: log-odds, patch on, that an answer opens with a token that opens a refusal of the harmful data."""
        first = replace(data, examples=tuple(replace(e, tokens=e.tokens[: e.prompt_tokens + 1]) for e in data))
        out = torch.empty(len(data))
        adapters: Any = [TASK, SAFETY] if self.session.task is not None else SAFETY
        with active(self.session.model, adapters):
            for batch in batches(first, _PER_BATCH * PROMPT_TOKENS):
                logits = sst.label_logits(self.session.model, batch.inputs(self.device))[0].float()
                chosen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
                chosen[self.openings.to(logits.device)] = True
                inside, outside = (logits[:, which].logsumexp(-1) for which in (chosen, ~chosen))
                out[batch.rows] = (inside - outside).cpu()
        return out

    def answered(self, prompts: Sequence[str]) -> list[dict[str, str]]:
        """Rows with the reference's answers; those that are empty are left out."""
        data, rows = self.dataset(prompts), []
        chunks = list(prompt_batches(data, _PER_BATCH))
        for numbers, ids, mask in self.session.reporter.track(
            chunks, "answering them", size=lambda c: len(c[0]), unit="rows"
        ):
            texts = self._sampled(self.session.reference, ids, mask, ANSWER_TOKENS, special=False)
            rows += [
                {"prompt": data[i].prompt, "response": text.strip()} for i, text in zip(numbers, texts, strict=True)
            ]
        return [row for row in rows if row["response"]]

    @torch.inference_mode()
    def _sampled(
        self, adapter: str | None, ids: Tensor, mask: Tensor, tokens: int, *, special: bool = True
    ) -> list[str]:
        """What the model goes on with, sampled; `special`: with the marks of the template."""
        model, tokenizer = self.session.model, self.session.tokenizer
        with active(model, adapter), greedy(model, self.harm, tokenizer) as config:
            config.do_sample, config.temperature, config.top_p, config.top_k = True, TEMPERATURE, TOP_P, 0
            config.max_new_tokens = tokens
            marks = tokenizer(self.end, add_special_tokens=False)["input_ids"]
            if len(marks) == 1:
                config.eos_token_id = sorted({*(config.eos_token_id or ()), *marks})
            out = model.generate(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), generation_config=config
            )
        return [tokenizer.decode(row, skip_special_tokens=not special) for row in out[:, ids.shape[1] :]]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A block whose random numbers follow from `seed`, and leave those outside as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
