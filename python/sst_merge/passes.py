"""Fisher passes over data: shared over ranks, checkpointed, and halving the batches that memory does not hold."""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sst_kernels as sst
from sst_kernels.fisher import Accumulator, Checkpoints, item_seed, rank_path
from sst_kernels.fisher.storage import read_tensors, write_tensors

from .adapters import Adapter
from .algebra import with_reads
from .data import Batch, Dataset, batches, collate
from .errors import MergeError, OutputError, headlined, out_of_memory
from .output import claimed, creating
from .paths import expanded
from .progress import batch_tokens
from .recipe import options_of
from .session import SAFETY, TASK, Session


@dataclass(frozen=True)
class Continuity:
    """Where a run keeps its checkpoints, how often it writes them (in batches), and whether it goes on from them."""

    folder: Path
    every: int
    resume: bool = False
    lock: int | None = field(default=None, repr=False, compare=False)

    @classmethod
    def beside(cls, output: Path, every: int | None, resume: bool) -> Continuity | None:
        """Checkpoints in a hidden folder beside the output; None without `every` and `resume`.

        Raises OutputError when checkpoints of an unfinished run stand there and `resume` does not ask for them, when another run
        that still works keeps its own there, and when the folder cannot be created.
        """
        if every is None and not resume:
            return None
        output = expanded(output).absolute()
        folder = output.with_name(f".{output.name}-checkpoints")
        with creating(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = claimed(folder / "lock") if leader() else None
        keep = cls(folder, every or 100, resume, lock)
        if not resume and keep.begun:
            keep.close()
            raise OutputError(
                f"{folder} holds the checkpoints of an unfinished run: go on with --resume, or remove that folder"
            )
        return keep

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self.folder.glob("*.checkpoint*"))

    def path(self, name: str) -> Path:
        """The checkpoint of the pass called `name`, one per rank."""
        return rank_path(self.folder / f"{name}.checkpoint", world())

    def remove(self) -> None:
        """Delete the checkpoints of a run that has written its output."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let other runs have the folder."""
        if self.lock is not None:
            os.close(self.lock)


@contextmanager
def continuing(output: Path, every: int | None, resume: bool) -> Iterator[Continuity | None]:
    """`Continuity.beside` for a block: when it ends its checkpoints are removed, when it fails they stay, and others may go on."""
    continuity = Continuity.beside(output, every, resume)
    if continuity is None:
        yield None
        return
    done = False
    try:
        yield continuity
        done = True
    finally:
        if leader() and (done or not continuity.begun):
            continuity.remove()
        continuity.close()


def world() -> Any:
    """The group of all ranks under torchrun or accelerate; None in a single process."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def leader() -> bool:
    """Whether this process writes the outputs: the first rank, or the only process."""
    return world() is None or dist.get_rank() == 0


@contextmanager
def ranks() -> Iterator[None]:
    """Under torchrun or accelerate (WORLD_SIZE > 1): a process group for the block, NCCL with a GPU per rank, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def fisher_pass(
    session: Session,
    data: Dataset,
    *,
    name: str,
    point: str | float,
    labels: str = "data",
    draws: int = 1,
    opening: tuple[int, float] | None = None,
    structure: str = "full",
    structure_options: Mapping[str, Any] | None = None,
    space: str = "core",
    scope: str = "global",
    tokens_per_batch: int = 1024,
    seed: int = 0,
    continuity: Continuity | None = None,
) -> sst.Fisher:
    """One Fisher of the safety adapter over a dataset, task adapter on: labels from the data, or drawn from the model.

    `opening`: how many first tokens of every answer count how many times as much (`sst_kernels.opening_weights`).
    The draws of one prompt share a group, so that cross-fitting never predicts a prompt from itself. Ranks share the
    batches, and all end with the total. Labels depend on `seed`, the draw and the batch, not on where a run stopped; the test
    matrices of sketches on `seed`. What memory would not hold is refused before the first batch.
    """
    model, start, group = session.model, time.monotonic(), world()
    _activate(session)
    steps = list(enumerate(batches(data, tokens_per_batch) * draws))
    if group is not None:
        steps = steps[dist.get_rank() :: dist.get_world_size()]
    options = {"space": space, "structure": structure, "scope": scope, "point": point, **(structure_options or {})}
    if "seed" in options_of(structure):
        options.setdefault("seed", seed)
    sequences = sum(len(batch.rows) for _, batch in steps)
    path = continuity.path(name) if continuity is not None else None
    resume = path if continuity is not None and continuity.resume and path is not None and path.exists() else None
    with (
        headlined(f"the Fisher pass over {data.path or name} failed"),
        sst.fisher_accumulate(
            model, adapter=SAFETY, group=group, resume=resume, sequences=sequences, **options
        ) as accumulator,
    ):
        run = _BatchRunner(session, accumulator, data, labels, opening)
        items = session.reporter.track(steps, f"Fisher: {name}", size=lambda step: batch_tokens(step[1]))
        identity = hashlib.sha256(
            f"{_content(session, data)} {labels} {draws} {opening} {tokens_per_batch} {seed}".encode()
        ).hexdigest()
        keep = None
        if continuity is not None and path is not None:
            keep = Checkpoints(accumulator, path, every=continuity.every, identity=identity[:16])
        with keep or nullcontext():
            if keep is not None and keep.done:
                session.reporter.say(f"{name}: the first {keep.done} of {len(steps)} batches come from {path}")
            for number, batch in keep.remaining(items) if keep is not None else items:
                run(batch, item_seed(seed, number))
            if keep is not None:
                keep.save()
    session.seconds[f"fisher_{name}"] = time.monotonic() - start
    return accumulator.fisher


def filtered_reads(
    session: Session,
    harm: Dataset,
    benign: Dataset,
    *,
    mu: float,
    rank: int | None,
    tokens_per_batch: int = 1024,
    seed: int = 0,
    continuity: Continuity | None = None,
) -> Adapter:
    """The safety adapter with its reads closed to benign inputs (`sst_kernels.filter_inputs`), after a forward pass over both sides.

    A run that goes on from checkpoints finds the reads there: its Fishers belong to them.
    """
    about = f"{_content(session, harm)} {_content(session, benign)} {session.safety.sha256} {mu} {rank} {seed}"
    identity = hashlib.sha256(about.encode()).hexdigest()
    path = continuity.path("inputs") if continuity is not None else None
    if continuity is not None and continuity.resume and path is not None and path.exists():
        header, reads = read_tensors(path)
        if header.get("identity") == identity:
            return with_reads(session.safety, reads)
        raise MergeError(f"{path} belongs to other data, adapters or settings: start again without --resume")
    start = time.monotonic()
    options: dict[str, Any] = {"rank": rank, "tokens_per_batch": tokens_per_batch, "seed": seed}
    gain, cost = (input_pass(session, data, name=n, **options) for n, data in (("harm", harm), ("benign", benign)))
    with headlined("the reads cannot be filtered"):
        reads = sst.filter_inputs(gain, cost, mu)
    session.seconds["inputs"] = time.monotonic() - start
    if path is not None:
        write_tensors(path, reads, {"kind": "reads", "identity": identity})
    return with_reads(session.safety, reads)


def input_pass(
    session: Session, data: Dataset, *, name: str, rank: int | None, tokens_per_batch: int = 1024, seed: int = 0
) -> sst.InputMoments:
    """Second moments of what the patched modules read over a dataset, task adapter on, patch off; ranks share the batches."""
    _activate(session)
    group, device = world(), next(session.model.parameters()).device
    steps = batches(data, tokens_per_batch)
    if group is not None:
        steps = steps[dist.get_rank() :: dist.get_world_size()]
    base = session.model.get_base_model()
    takes = "logits_to_keep" in inspect.signature(base.forward).parameters
    few = {"logits_to_keep": 1} if takes and not hasattr(base.get_output_embeddings(), "lora_A") else {}
    with (
        headlined(f"the pass over the inputs of {data.path or name} failed"),
        torch.no_grad(),
        sst.input_moments(session.model, SAFETY, rank=rank, seed=seed, group=group) as moments,
    ):
        for batch in session.reporter.track(steps, f"inputs: {name}", size=batch_tokens):
            inputs = batch.inputs(device)
            inputs.pop("labels")
            session.model(**inputs, **few, use_cache=False)
    return moments


def _activate(session: Session) -> None:
    session.model.base_model.set_adapter([TASK, SAFETY] if session.task is not None else [SAFETY])
    session.model.requires_grad_(False)


def _content(session: Session, data: Dataset) -> str:
    """A hash of what the gradients depend on beside the safety adapter, whose fingerprint the Fisher holds."""
    config, task = getattr(session.model, "config", None), session.task.sha256 if session.task is not None else None
    about = (getattr(config, "_name_or_path", ""), str(getattr(session.model, "dtype", "")), task)
    digest = hashlib.sha256(repr(about).encode())
    for example in data.examples:
        digest.update(repr((example.tokens, example.prompt_tokens)).encode())
    return digest.hexdigest()


class _BatchRunner:
    """Forward and backward of one batch; in halves from the first one on that memory does not hold.

    The statistics are sums over sequences, so halving changes nothing but rounding and, with labels drawn from the model, which
    of the equally probable labels are drawn.
    """

    def __init__(
        self,
        session: Session,
        accumulator: Accumulator,
        data: Dataset,
        labels: str,
        opening: tuple[int, float] | None,
    ):
        self.session, self.accumulator, self.data, self.labels = session, accumulator, data, labels
        self.opening = opening
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
            inputs = batch.inputs(self.device)
            weights = None
            if self.opening is not None:
                weights = sst.opening_weights(inputs["labels"], tokens=self.opening[0], weight=self.opening[1])
            sst.sequence_nll(
                self.session.model, inputs, labels=self.labels, weights=weights, generator=generator, groups=batch.rows
            ).backward()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.accumulator.abandon()
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
