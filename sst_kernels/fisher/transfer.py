"""State on the host beside a model on a GPU: what a batch adds leaves on a stream of its own, while the model goes on.

    compute stream   … backward of batch i │ forward, backward of batch i + 1 …
    copy stream               waits for it └─► pinned memory ─┐ event
    host                                        waits for it └─► added, when batch i + 2 is sent or the state is read

Sums are formed where the tokens are, never on the host: a joint structure is sent its rows, any other one the state that
the batch alone makes (`Structure.share`), which merging adds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, cuda

from sst_kernels.fisher.base import Structure, TokenBatch

DEPTH = 2  # copies under way: one that arrives while the next is made


def crosses(source: torch.device, target: torch.device) -> bool:
    """Whether what stands on `source` has to leave a GPU for the host to reach `target`."""
    return source.type == "cuda" and target.type == "cpu"


class HostCopies:
    """Copies from GPUs to the host, in order, no more than `DEPTH` under way."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, cuda.Stream] = {}
        self._under_way: deque[tuple[cuda.Event, Sequence[Tensor], list[Tensor], Callable[..., None]]] = deque()

    def send(self, tensors: Sequence[Tensor], take: Callable[..., None]) -> None:
        """Start copying `tensors` of one GPU; `take(*copies)` is called when their room is needed, or by `drain`.

        Nobody may write into the tensors afterwards. They are held until their copies are complete, and the copies are free for
        reuse when `take` returns.
        """
        if len(self._under_way) == DEPTH:
            self._take_oldest()
        device = tensors[0].device
        stream = self._streams.get(device) or self._streams.setdefault(device, cuda.Stream(device))
        stream.wait_stream(cuda.current_stream(device))
        with cuda.stream(stream):
            copies = [_pinned(tensor).copy_(tensor, non_blocking=True) for tensor in tensors]
            arrived = cuda.Event()
            arrived.record(stream)
        self._under_way.append((arrived, tensors, copies, take))

    def add(self, structure: Structure, batch: TokenBatch) -> None:
        """Add a batch of tokens on a GPU to a structure on the host; `structure` holds it after `drain`."""
        share = structure.share(batch.left.device)
        share.update(batch)
        state = share.state_dict()

        def take(*copies: Tensor) -> None:
            copied = structure.share(structure.device)
            copied.load_state_dict(dict(zip(state, copies)))
            copied.counts = share.counts
            structure.merge(copied)

        self.send(list(state.values()), take)

    def drain(self) -> None:
        """Wait for all copies and take them."""
        while self._under_way:
            self._take_oldest()

    def _take_oldest(self) -> None:
        arrived, _, copies, take = self._under_way.popleft()
        arrived.synchronize()
        take(*copies)


def _pinned(tensor: Tensor) -> Tensor:
    """Page-locked memory for a copy of `tensor`; torch keeps what is freed, and gives it out again once copies into it are done."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
