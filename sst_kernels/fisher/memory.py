"""What a Fisher pass and a pencil will take in memory, said before the first batch.

`state` is what the structure holds when the pass ends (its `nbytes`), `peak` the most that it and its own temporaries take at
any time. The model, its activations and the logits are the caller's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sst_kernels.fisher.available import available
from sst_kernels.fisher.base import Block, whole
from sst_kernels.fisher.estimate import SINGLE, Estimate, estimate_moments
from sst_kernels.fisher.fisher import Fisher, arrangement
from sst_kernels.fisher.structures.full import Full

__all__ = ["Estimate", "estimate", "estimate_moments", "require", "reserve"]


def estimate(
    structure: str,
    blocks: Sequence[Block],
    samples: int,
    *,
    batch: int = 1,
    space: str = "core",
    scope: str = "global",
    sample: str = "sequence",
    options: Mapping[str, Any] | None = None,
) -> Estimate:
    """The memory of a pass over `samples` sequences (tokens for sample="token") in batches of `batch`.

    `blocks`, `space`, `scope` and `options` as in `fisher_accumulate`. ValueError for an unknown structure.
    """
    kind, joint, given = arrangement(structure, dict(options or {}), space=space, scope=scope, sample=sample)
    if joint:
        size = sum(b.size for b in blocks)
        own = kind.estimate((size, 1), samples, batch, **given)
        return Estimate(own.state, own.peak + SINGLE * batch * size)
    parts = [kind.estimate(b.shape, samples, batch, **given) for b in blocks]
    return sum(parts[1:], parts[0])


def require(
    what: str, needed: Estimate, device: torch.device | str, alternatives: Mapping[str, Estimate], otherwise: str
) -> None:
    """MemoryError, naming those alternatives that would fit or else `otherwise`, unless `needed.peak` bytes are available on `device`.

    With SST_MEMORY=warn in the environment a warning. ValueError when that variable is neither "warn" nor "refuse".
    """
    asked = os.environ.get("SST_MEMORY") or "refuse"
    if asked not in ("refuse", "warn"):
        raise ValueError(f'SST_MEMORY: expected "refuse" or "warn", got {asked!r}')
    free = available(device)
    if free is None or needed.peak <= free:
        return
    fitting = [f"{instead} ({_gib(e.peak)})" for instead, e in alternatives.items() if e.peak <= free]
    advice = f"these would fit: {'; '.join(fitting)}" if fitting else otherwise
    text = f"{what} would take {_gib(needed.peak)} on {device} and {_gib(free)} are available; {advice}"
    if asked == "refuse":
        raise MemoryError(f"{text}; SST_MEMORY=warn in the environment tries all the same")
    warnings.warn(text, stacklevel=3)


def reserve(fisher: Fisher, sequences: int, options: Mapping[str, Any], ranks: int = 1) -> None:
    """Set memory aside for the rows of `sequences`. MemoryError, naming what would fit, when a pass over them would not.

    Each of `ranks` processes brings about as many, and holds the total in the end.
    """
    sequences = whole("sequences", sequences, 0)
    meta, joint = fisher.meta, fisher.joint
    about = {"space": meta["space"], "scope": meta["scope"], "sample": meta["sample"]}
    total = sequences * ranks
    others: dict[str, tuple[str, dict[str, Any]]] = {
        f'structure="lowrank", rank={rank}': ("lowrank", {"rank": rank}) for rank in (1024, 256, 64)
    }
    others |= {'scope="module"': ("full", {"rows": "fold"}), 'structure="diagonal"': ("diagonal", {})}
    homes = {name: (fisher[name] if joint is None else joint).device for name in fisher.blocks}
    for device in dict.fromkeys(homes.values()):
        blocks = [block for name, block in fisher.blocks.items() if homes[name] == device]
        needed = estimate(meta["structure"], blocks, total, options=options, **about)
        if isinstance(joint, Full):  # nothing has to double; a rank's own rows stand beside the total while it arrives
            needed = Estimate(needed.state, needed.state + (needed.state // ranks if ranks > 1 else 0))
        alternatives = {
            what: estimate(kind, blocks, total, options=given, **about)
            for what, (kind, given) in others.items()
            if meta["space"] == "core"
        }
        require("the Fisher state", needed, device, alternatives, "use fewer sequences, fewer modules or a lower rank")
    if isinstance(joint, Full):
        try:
            joint.reserve(sequences)
        except RuntimeError as error:  # torch's, of a host or a device whose memory is in pieces
            raise MemoryError(f"{_gib(needed.state)} in one piece are not free on {joint.device}: {error}") from error


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 26 else f"{size / 2**20:.2f} MiB"
