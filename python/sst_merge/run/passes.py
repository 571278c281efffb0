"""Fisher passes of their own, for structures and points that the evidence does not hold."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch

import sst_kernels as sst
from sst_kernels.fisher import Checkpoints, item_seed

from ..errors import headlined
from ..io.data import Batch, Dataset
from ..progress import batch_tokens
from ..recipe import options_of
from ..session import SAFETY, Session
from .checkpoints import Continuity
from .collect import Halving, activate, content, digest, steps_of
from .launch import world


def fisher_pass(
    session: Session,
    data: Dataset,
    *,
    name: str,
    point: str | float,
    labels: Literal["mc", "empirical"] = "empirical",
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
    model, start = session.model, time.monotonic()
    activate(session)
    steps = steps_of(data, tokens_per_batch, draws)
    options = {"space": space, "structure": structure, "scope": scope, "point": point, **(structure_options or {})}
    if "seed" in options_of(structure):
        options.setdefault("seed", seed)
    sequences = sum(len(batch.rows) for _, batch in steps)
    path = continuity.path(name) if continuity is not None else None
    resume = path if continuity is not None and continuity.resume and path is not None and path.exists() else None
    with (
        headlined(f"the Fisher pass over {data.path or name} failed"),
        sst.fisher_accumulate(
            model, adapter=SAFETY, group=world(), resume=resume, sequences=sequences, **options
        ) as accumulator,
    ):

        def attempt(batch: Batch, generator: torch.Generator) -> None:
            inputs, weights = batch.inputs(generator.device), None
            if opening is not None:
                weights = sst.opening_weights(inputs["labels"], tokens=opening[0], weight=opening[1])
            sst.sequence_nll(
                model, inputs, labels=labels, weights=weights, generator=generator, groups=batch.rows
            ).backward()

        run = Halving(session, data, attempt, accumulator.abandon)
        items = session.reporter.track(steps, f"Fisher: {name}", size=lambda step: batch_tokens(step[1]))
        identity = digest(content(session, data), labels, draws, opening, tokens_per_batch, seed)
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
