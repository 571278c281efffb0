"""One reading of the data: harmful prompts with refusals and benign ones with answers in, an `Evidence` out.

Shared over ranks, checkpointed, and in halves where memory does not hold a batch. Everything else a merge does follows from it.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import sst_kernels as sst
from sst_kernels.distributed import gather_objects
from sst_kernels.fisher import Checkpoints, item_seed
from sst_kernels.fisher.available import available
from sst_kernels.inputs import basis_of

from ..errors import MergeError, headlined, out_of_memory
from ..io.data import Batch, Dataset, batches, collate
from ..progress import batch_tokens
from ..session import SAFETY, TASK, Session
from ..specs import Collection
from .checkpoints import Continuity
from .launch import leader, world

OPENING, REST = "opening", "rest"  # the gain's named losses: the first tokens of a refusal, and what follows
PILOT = 4  # one batch in so many is read for a basis
_SPARE = 0.5  # share of the memory that is free that gradients may take


def collect(
    session: Session,
    harm: Dataset,
    benign: Dataset,
    spec: Collection,
    continuity: Continuity | None = None,
    safe: Dataset | None = None,
) -> sst.Evidence:
    """Read the datasets once, task adapter on, patch off; ranks share the batches, and all end with the total.

    safe: prompts that must not be refused: read with the opening of a refusal (`unwanted`), and kept as the evidence's guard.

    Labels depend on `spec.seed` and the batch, not on where a run stopped. Draws of one prompt share a group, so that cross-fitting
    never predicts a prompt from itself. Raises MergeError, before the first batch for what memory does not hold.
    """
    start = time.monotonic()
    activate(session)
    losses = 2 if spec.opening_tokens and spec.opening_weight is None else 1
    guard = unwanted(safe, harm) if safe is not None else None
    evidence = _empty(session, harm, benign, spec, losses, continuity, 0 if guard is None else len(guard))
    sides: list[tuple[Any, str, Dataset, int, int]] = [
        ("gain", "harm", harm, 1, losses),
        ("cost", "benign", benign, spec.draws, 1),
    ]
    sides += [("guard", "safe", guard, 1, 1)] if guard is not None else []
    for side, name, data, draws, named in sides:
        work = steps_of(data, spec.tokens_per_batch)
        path = continuity.path(f"reading-{name}") if continuity is not None else None
        resume = path if continuity is not None and continuity.resume and path is not None and path.exists() else None
        sequences = draws * sum(len(b.rows) for _, b in work)
        with (
            headlined(f"reading {data.path or name} failed"),
            evidence.accumulate(side, sequences=sequences, losses=named, resume=resume) as reading,
        ):
            run = Halving(session, data, partial(_read, reading, side, spec), reading.abandon)
            items = session.reporter.track(work, f"reading: {name}", size=lambda step: batch_tokens(step[1]))
            keep = None
            if continuity is not None and path is not None:
                identity = digest(content(session, data), side, spec.facts(), data.path == "")
                keep = Checkpoints(reading, path, every=continuity.every, identity=identity[:16])
            with keep or nullcontext():
                if keep is not None and keep.done:
                    session.reporter.say(f"{name}: the first {keep.done} of {len(work)} batches come from {path}")
                for number, batch in keep.remaining(items) if keep is not None else items:
                    run(batch, item_seed(spec.seed, number))
                if keep is not None:
                    keep.save()
    evidence.notes |= {"harm rows": rows_digest(harm), "benign rows": rows_digest(benign)}
    session.seconds["reading"] = time.monotonic() - start
    return evidence


def facts_of(session: Session, spec: Collection) -> dict[str, str]:
    """What evidence depends on beside the safety adapter's weights: `Evidence.about`."""
    return {
        "model": model_digest(session.model),
        "task": session.task.sha256 if session.task is not None else "",
        "template": digest(str(getattr(session.tokenizer, "chat_template", None))),
        "opening_weight": str(spec.opening_weight if spec.opening_tokens else 1.0),
        "reading": repr(sorted(spec.facts().items())),
    }


def unwanted(safe: Dataset, harm: Dataset) -> Dataset:
    """Refusals that nobody wants: every safe prompt with the first token of one of `harm`'s refusals for an answer.

    A refusal is so unlikely there that labels drawn from the model never show what the patch does to it.
    """
    openings = [e.tokens[e.prompt_tokens] for e in harm]
    examples = (
        replace(e, tokens=(*e.tokens[: e.prompt_tokens], openings[i % len(openings)])) for i, e in enumerate(safe)
    )
    return replace(safe, examples=tuple(examples))


def rows_digest(data: Dataset) -> str:
    """A hash of tokenised rows: which ones an evidence was collected from."""
    return digest([(example.tokens, example.prompt_tokens) for example in data.examples])


def activate(session: Session) -> None:
    """Task and safety adapter on the model, everything frozen."""
    session.model.base_model.set_adapter([TASK, SAFETY] if session.task is not None else [SAFETY])
    session.model.requires_grad_(False)


def steps_of(data: Dataset, tokens_per_batch: int, repeats: int = 1) -> list[tuple[int, Batch]]:
    """This rank's numbered batches."""
    steps = list(enumerate(batches(data, tokens_per_batch) * repeats))
    return steps if world() is None else steps[dist.get_rank() :: dist.get_world_size()]


def content(session: Session, data: Dataset) -> str:
    """A hash of what gradients depend on beside the safety adapter, whose fingerprint they hold."""
    config, task = getattr(session.model, "config", None), session.task.sha256 if session.task is not None else None
    about = (getattr(config, "_name_or_path", ""), str(getattr(session.model, "dtype", "")), task)
    return digest(about, [(example.tokens, example.prompt_tokens) for example in data.examples])


def digest(*facts: Any) -> str:
    """SHA-256 of plain values."""
    total = hashlib.sha256()
    for fact in facts:
        total.update(repr(fact).encode())
    return total.hexdigest()


def model_digest(model: torch.nn.Module) -> str:
    """A hash of names, shapes and some values of every weight but the adapters': another model of the same shape differs."""
    total = hashlib.sha256()
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            flat = weight.detach().flatten()
            some = flat[:: max(1, len(flat) // 64)].to("cpu", torch.float32)
            total.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return total.hexdigest()


def _read(reading: Any, side: str, spec: Collection, batch: Batch, generator: torch.Generator) -> None:
    inputs = batch.inputs(generator.device)
    if side == "cost":
        reading.backward(inputs, labels=spec.labels, draws=spec.draws, generator=generator, groups=batch.rows)
        return
    if side == "guard":
        reading.backward(inputs, groups=batch.rows)
        return
    labels, count, weight = inputs["labels"], spec.opening_tokens, spec.opening_weight
    weights: Any = None
    if count and weight is None:
        rest = sst.opening_weights(labels, tokens=count, weight=0.0)
        weights = {OPENING: 1 - rest, REST: rest}
    elif count and weight is not None and weight != 1:
        weights = sst.opening_weights(labels, tokens=count, weight=weight)
    reading.backward(inputs, weights=weights, groups=batch.rows)


def _empty(
    session: Session,
    harm: Dataset,
    benign: Dataset,
    spec: Collection,
    losses: int,
    continuity: Continuity | None,
    guard: int,
) -> sst.Evidence:
    """Evidence that holds nothing yet, in the form that memory has room for."""
    options: dict[str, Any] = {
        "rank": spec.input_rank,
        "seed": spec.seed,
        "group": world(),
        "state_device": "cpu" if next(session.model.parameters()).device.type == "cuda" else None,
        "about": facts_of(session, spec),
    }
    width = sum(term.rank * term.A.shape[1] for term in session.safety.terms.values())
    form = _form(4 * width * (len(harm) * losses + len(benign) * spec.draws + guard), spec, continuity)
    with headlined("the data cannot be read"):
        if form == "basis":  # of what filters of many prices read, from forward passes over a share of the prompts
            pilot = {"every": PILOT}
            options["basis"] = basis_of(
                input_pass(session, "harm", harm, spec, **pilot), input_pass(session, "benign", benign, spec, **pilot)
            )
        elif form == "bfloat16":
            options["dtype"] = "bfloat16"
        return sst.Evidence.of(session.model, SAFETY, **options)


def _form(size: int, spec: Collection, continuity: Continuity | None) -> str:
    """How gradients of `size` bytes in float32 are kept: the same on every rank, and in a run that goes on."""
    forms = ("float32", "bfloat16", "basis")
    kept = None if continuity is None else continuity.folder / "form"
    if kept is not None and continuity is not None and continuity.resume and kept.exists():
        return kept.read_text(encoding="utf-8")
    free = available("cpu")
    room = float("inf") if free is None else _SPARE * free
    wanted = 2 if spec.form == "basis" else 0
    if spec.form == "auto":
        wanted = 0 if size <= room else 1 if size / 2 <= room else 2
    form = forms[wanted if world() is None else max(gather_objects(wanted, world()))]
    if kept is not None and leader():
        kept.write_text(form, encoding="utf-8")
    return form


def input_pass(session: Session, name: str, data: Dataset, spec: Collection, *, every: int = 1) -> sst.InputMoments:
    """Second moments of what the patched modules read, from forward passes alone over one batch in `every`."""
    device = next(session.model.parameters()).device
    work = [batch for _, batch in steps_of(data, spec.tokens_per_batch)][::every]
    base = session.model.get_base_model()
    takes = "logits_to_keep" in inspect.signature(base.forward).parameters
    few = {"logits_to_keep": 1} if takes and not hasattr(base.get_output_embeddings(), "lora_A") else {}
    with (
        headlined(f"the pass over the inputs of {data.path or name} failed"),
        torch.no_grad(),
        sst.input_moments(session.model, SAFETY, rank=spec.input_rank, seed=spec.seed, group=world()) as moments,
    ):
        for batch in session.reporter.track(work, f"inputs: {name}", size=batch_tokens):
            inputs = batch.inputs(device)
            inputs.pop("labels")
            session.model(**inputs, **few, use_cache=False)
    return moments


class Halving:
    """Runs one batch; in halves from the first one on that memory does not hold.

    What is kept are sums over sequences, or a row each, so halving changes nothing but rounding and, with labels drawn from the
    model, which of the equally probable labels are drawn.

    Args:
        attempt: forward and backward of a batch with a generator. abandon: forgets one that failed.
    """

    def __init__(
        self,
        session: Session,
        data: Dataset,
        attempt: Callable[[Batch, torch.Generator], None],
        abandon: Callable[[], None],
    ):
        self.session, self.data, self.attempt, self.abandon = session, data, attempt, abandon
        self.device = next(session.model.parameters()).device
        self.most = float("inf")  # padded tokens of a batch that are known to fit

    def __call__(self, batch: Batch, seed: int) -> None:
        generator = torch.Generator(self.device).manual_seed(seed)
        waiting = [batch]
        while waiting:
            batch = waiting.pop()
            if batch_tokens(batch) > self.most and len(batch.rows) > 1:
                waiting += reversed(self._halves(batch))
            elif not self._fits(batch, generator):
                self._shrink(batch)
                waiting += reversed(self._halves(batch))

    def _fits(self, batch: Batch, generator: torch.Generator) -> bool:
        try:
            self.attempt(batch, generator)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.abandon()
            return False
        return True

    def _shrink(self, batch: Batch) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        rows, tokens = len(batch.rows), batch_tokens(batch)
        if rows == 1:
            raise MergeError(
                f"a single sequence of {tokens} tokens (line {self.data[batch.rows[0]].line} of {self.data.path}) does not fit into "
                "memory: lower max_length, or use a smaller dtype or another device"
            )
        self.most = min(self.most, tokens / 2)
        self.session.reporter.warn(
            f"out of memory at {rows} sequences, {tokens} tokens: going on with batches half as large"
        )

    def _halves(self, batch: Batch) -> list[Batch]:
        middle = (len(batch.rows) + 1) // 2
        return [collate(self.data, rows) for rows in (batch.rows[:middle], batch.rows[middle:])]
