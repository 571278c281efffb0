"""State on the host beside a model on a GPU: without one, on streams that do their work as late and in as bad an order as CUDA may.

`Streams` stands in for torch.cuda. What is queued on a stream, non-blocking copies above all, runs only when somebody waits for an event,
and which stream then goes on is drawn at random. Memory that a copy has not reached yet, and copies that were taken already, hold NaN.
"""

from __future__ import annotations

import random
import weakref
from contextlib import contextmanager, nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor

from sst_kernels import fisher_accumulate, sequence_nll
from sst_kernels.fisher import Fisher, accumulator, hooks, transfer
from sst_kernels.fisher.transfer import DEPTH, HostCopies
from tests.models import tiny_batch, tiny_lora


class Stream:
    def __init__(self, device: object = None):
        self.queue: list = []

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.queue.append(event)


class Event:
    def __init__(self) -> None:
        self.reached = False

    def record(self, stream: Stream) -> None:
        stream.queue.append(lambda: setattr(self, "reached", True))

    def synchronize(self) -> None:
        while not self.reached:
            Streams.now.advance()


class Streams:
    """torch.cuda as `transfer` uses it; inside the context a model on the CPU stands on a GPU, and its state on the host."""

    Event, now = Event, None

    def __init__(self, seed: int = 0):
        self.draw, self.used, Streams.now = random.Random(seed), False, self
        self._start()

    def _start(self) -> None:
        self.compute = self.current = Stream()
        self.all, self.copying, self.most = [self.compute], 0, 0

    def __enter__(self) -> None:
        self._start()
        self.used = True

    def __exit__(self, *error: object) -> None:
        self.used = False

    def Stream(self, device: object) -> Stream:
        self.all.append(Stream())
        return self.all[-1]

    def current_stream(self, device: object) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream):
        self.current, before = stream, self.current
        yield
        self.current = before

    def advance(self) -> None:
        ready = [s for s in self.all if s.queue and not (isinstance(s.queue[0], Event) and not s.queue[0].reached)]
        work = self.draw.choice(ready).queue.pop(0)
        if not isinstance(work, Event):
            work()


class Pinned:
    """Memory for a copy that a stream of `Streams` makes when its turn comes."""

    def __init__(self, like: Tensor):
        self.memory = poison(torch.empty_like(like))

    def copy_(self, tensor: Tensor, non_blocking: bool) -> Tensor:
        streams, source = Streams.now, weakref.ref(tensor)

        def copy() -> None:
            assert source() is not None, "the source was given up before its copy was made"
            self.memory.copy_(source())
            streams.copying -= 1

        assert non_blocking
        streams.copying += 1
        streams.most = max(streams.most, streams.copying)
        streams.current.queue.append(copy)
        return self.memory


def poison(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**40))


@pytest.fixture(params=range(2))
def streams(monkeypatch, request) -> Streams:
    fake, send = Streams(request.param), HostCopies.send

    def sent(copies: HostCopies, tensors, take) -> None:
        def then_reused(*arrived: Tensor) -> None:
            take(*arrived)
            for tensor in arrived:
                poison(tensor)

        send(copies, tensors, then_reused)

    monkeypatch.setattr(transfer, "cuda", fake)
    monkeypatch.setattr(transfer, "_pinned", Pinned)
    monkeypatch.setattr(accumulator, "crosses", lambda source, target: fake.used)
    monkeypatch.setattr(HostCopies, "send", sent)
    return fake


@pytest.mark.parametrize("seed", range(20))
def test_copies_hold_what_was_computed_whatever_runs_first(seed, streams):
    """Tensors that the compute stream has still to write when they are sent; it goes on writing others meanwhile."""
    copies, arrived, streams.draw = HostCopies(), [], random.Random(seed)
    for i in range(7):
        tensor = poison(torch.empty(3))
        streams.compute.queue.append(lambda tensor=tensor, i=i: tensor.fill_(i))
        copies.send([tensor, torch.full((), i)], lambda a, b: arrived.append((a.tolist(), int(b))))
        assert len(arrived) == max(0, i + 1 - DEPTH)
        del tensor
    copies.drain()
    assert arrived == [([i] * 3, i) for i in range(7)]
    assert streams.most <= 2 * DEPTH


def run(streams: Streams | None = None, skip: int | None = None, **options) -> accumulator.Accumulator:
    """A pass over five batches; the gradients of batch `skip` are NaN."""
    model = tiny_lora()
    with streams or nullcontext(), fisher_accumulate(model, "safety", **options) as pass_:
        for i in range(5):
            loss = sequence_nll(model, tiny_batch(3, seed=i))
            (loss * torch.nan if i == skip else loss).backward()
    return pass_


CASES = {
    "full": {},
    "full, module": {"scope": "module"},
    "full, tokens": {"sample": "token"},
    "lowrank": {"structure": "lowrank", "rank": 4},
    "lowrank, factor": {"structure": "lowrank", "rank": 16, "space": "factor"},
    "diagonal": {"structure": "diagonal"},
    "diagonal, factor": {"structure": "diagonal", "space": "factor", "centred": True},
    "vila": {"structure": "vila", "space": "factor"},
    "kronecker": {"structure": "kronecker", "space": "factor"},
    "kronecker, reduce": {"structure": "kronecker", "space": "factor", "approx": "reduce"},
    "kronecker_lowrank": {"structure": "kronecker_lowrank", "space": "factor", "rank": 8},
    "kronecker_svd": {"structure": "kronecker_svd"},
}


@cache
def beside(case: str) -> Fisher:
    """The case with its state beside the model."""
    return run(**CASES[case]).fisher


ROWS = (
    "full",
    "full, tokens",
    "lowrank",
    "diagonal",
    "kronecker_svd",
)  # what these send is what they would have taken in


@pytest.mark.parametrize("case", CASES)
def test_state_on_the_host_is_the_state_beside_the_model(case, streams):
    expected, actual = beside(case), run(streams, **CASES[case]).fisher
    assert streams.copying == 0 < streams.most
    assert (actual.counts, actual.groups, actual.meta) == (expected.counts, expected.groups, expected.meta)
    (_, mine), (_, theirs) = actual.pack(), expected.pack()
    for name, tensor in theirs.items():
        if case in ROWS:
            assert torch.equal(mine[name], tensor)
        else:
            torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-6 * float(tensor.abs().max()))


def test_an_eigenbasis_comes_along(streams):
    basis = beside("kronecker")
    options = {"structure": "eigen_kronecker", "space": "factor", "basis": basis}
    expected, actual = run(**options).fisher, run(streams, **options).fisher
    for name in expected:
        exact = expected[name].dense()
        assert (actual[name].dense() - exact).norm() <= 1e-6 * exact.norm()


def test_reading_waits_for_what_is_under_way(streams):
    model, expected = tiny_lora(), beside("full").rows()
    with streams, fisher_accumulate(model, "safety") as pass_:
        for i in range(5):
            sequence_nll(model, tiny_batch(3, seed=i)).backward()
            assert streams.copying == min(i + 1, 1)
            assert pass_.fisher.counts.sequences == 3 * (i + 1)
            assert torch.equal(pass_.fisher.rows(), expected[: 3 * (i + 1)])


def test_what_was_skipped_is_known_when_asked(streams):
    model = tiny_lora()
    with streams, fisher_accumulate(model, "safety", nonfinite="skip") as pass_:
        for factor in (1.0, torch.nan):
            (sequence_nll(model, tiny_batch(2)) * factor).backward()
        assert pass_.skipped == [(1, 0), (1, 1)]


def test_checkpoints_hold_every_batch(streams, tmp_path):
    """Taken after each batch, and resumed from the third: the bytes of a pass that has its state beside the model."""
    for name, mode in (("beside", None), ("host", streams)):
        model = tiny_lora()
        with mode or nullcontext(), fisher_accumulate(model, "safety") as pass_:
            for i in range(5):
                sequence_nll(model, tiny_batch(3, seed=i)).backward()
                pass_.save_checkpoint(tmp_path / f"{name}{i}", {"items": i})
    for i in range(5):
        assert (tmp_path / f"host{i}").read_bytes() == (tmp_path / f"beside{i}").read_bytes()
    with streams, fisher_accumulate(model, "safety", resume=tmp_path / "host2") as pass_:
        for i in (3, 4):
            sequence_nll(model, tiny_batch(3, seed=i)).backward()
    assert torch.equal(pass_.fisher.rows(), beside("full").rows())


@pytest.mark.parametrize("bad", range(5))
def test_gradients_that_are_not_finite_are_found_on_arrival(bad, streams):
    with pytest.raises(FloatingPointError, match=rf"batch {bad}: the gradients of samples \[0, 1, 2\]"):
        run(streams, bad)
    kept, expected = run(streams, bad, nonfinite="skip"), run(None, bad, nonfinite="skip")
    assert kept.skipped == expected.skipped == [(bad, 0), (bad, 1), (bad, 2)]
    assert torch.equal(kept.fisher.rows(), expected.fisher.rows())
    assert kept.fisher.counts == expected.fisher.counts


def test_ranks_reduce_what_has_arrived(streams, monkeypatch):
    reduced = []
    monkeypatch.setattr(hooks, "raise_together", lambda error, group: None)
    monkeypatch.setattr(Fisher, "all_reduce", lambda fisher, group: reduced.append(fisher.rows().clone()))
    run(streams, group="all of them")
    assert torch.equal(reduced[0], beside("full").rows())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES)
def test_state_device(case, device):
    """Beside the model and on the host, over batches enough to fill every buffer several times."""
    model = tiny_lora().to(device)
    fishers = []
    for where in (None, "cpu"):
        with fisher_accumulate(model, "safety", state_device=where, **CASES[case]) as pass_:
            for i in range(4 * DEPTH):
                batch = {name: tensor.to(device) for name, tensor in tiny_batch(3 + i % 3, seed=i).items()}
                sequence_nll(model, batch).backward()
        fishers.append(pass_.fisher)
    beside, host = fishers
    assert {holder.device.type for holder in beside.values()} == {device}
    assert {holder.device.type for holder in host.values()} == {"cpu"}
    assert host.counts == beside.counts
    if case == "full":
        assert torch.equal(host.rows(), beside.rows().cpu())
    for name in beside:
        expected = beside[name].dense().cpu()
        assert (host[name].dense() - expected).norm() <= 1e-5 * expected.norm()  # float32 sums in another order


@pytest.mark.gpu
def test_copies_go_on_while_the_gpu_computes():
    """The copy of a finished tensor arrives although the compute stream is still at work on something else."""
    ready, arrived = torch.arange(4.0, device="cuda"), []
    copies = HostCopies()
    torch.cuda.synchronize()
    copies.send([ready], arrived.append)
    torch.cuda._sleep(2_000_000_000)
    busy = torch.cuda.Event()
    busy.record()
    copies.drain()
    assert not busy.query()
    assert arrived[0].tolist() == [0, 1, 2, 3]
