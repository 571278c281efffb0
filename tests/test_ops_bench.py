"""The clock of `bench/ops.py` on a pretended device: a call whose launching outlasts the sleep ahead of it is not what is reported."""

import pytest
import torch

from bench import ops


@pytest.fixture
def device(monkeypatch):
    """Sleeps as many cycles as asked; `host` is how many go by while a call is queued. Events read the device's own clock."""

    class Device:
        slept = host = 0

        def sleep(self, cycles):
            self.slept = cycles

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            pass

        def query(self):
            return gpu.host > gpu.slept

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1.0 + max(0, gpu.host - gpu.slept)

    gpu = Device()
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return gpu


def clock():
    made = ops.Clock("cpu", 1)
    made.flush = torch.empty(1)
    return made


def test_the_sleep_grows_until_it_hides_the_host(device):
    timed = clock()

    def slow_to_launch():
        device.host = 100_000_000

    assert timed._queued(slow_to_launch) == 1.0
    assert timed.cycles >= device.host


def test_a_call_that_waits_for_the_device_is_refused(device):
    def waits():
        device.host = device.slept + 1

    with pytest.raises(RuntimeError, match="waits for the device"):
        clock()._queued(waits)


def test_sketches_are_measured_at_the_columns_of_the_recipe():
    assert any(size.r == 512 for size in ops.sizes("sketch", "cuda", 224, few=False))
    assert any(size.r == 512 for size in ops.sizes("sketch", "cuda", 224, few=True))
