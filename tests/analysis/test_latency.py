import pytest
import torch
from torch import nn

from dset_d2.analysis import latency, measure, measure_modules


class Time:
    """A clock that only work moves on."""

    now = 0.0

    def work(self, seconds):
        self.now += seconds


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(latency, "synchronised_time", lambda: time.now)
    return time


def test_callables_take_turns():
    calls = []
    latencies = measure({name: lambda n=name: calls.append(n) for name in "abc"}, 2, 1)
    assert calls == list("abc" * 3)
    assert list(latencies) == list("abc")


def test_ratios_are_those_of_the_rounds(time):
    # The second always takes twice as long as the first, however slow the machine is then.
    pace = iter([50, 50, 1, 1, 8, 8, 2, 2, 4, 4, 16, 16])
    calls = {
        "first": lambda: time.work(next(pace)),
        "second": lambda: time.work(2 * next(pace)),
    }
    latencies = measure(calls, rounds=5, warmup=1)
    assert latencies["first"] == latency.Latency(4, (2, 8), 1, (1, 1))
    assert latencies["second"] == latency.Latency(8, (4, 16), 2, (2, 2))


@pytest.mark.parametrize("rounds, warmup", [(0, 1), (1, -1)])
def test_impossible_rounds(rounds, warmup):
    with pytest.raises(ValueError, match=f"rounds={rounds} .* warmup={warmup}"):
        measure({"a": int}, rounds, warmup)


class Work(nn.Module):
    def __init__(self, time, seconds):
        super().__init__()
        self.time = time
        self.seconds = seconds

    def forward(self, x):
        self.time.work(self.seconds)
        return x


def test_modules_are_timed_over_all_their_calls(time):
    twice, idle = Work(time, 1), Work(time, 9)
    parts = nn.ModuleList([Work(time, 1), Work(time, 4)])
    model = nn.Sequential(twice, twice)

    def call():
        x = model(torch.zeros(1))
        for part in parts:
            x = part(x)

    modules = {"model": model, "twice": twice, "parts": parts, "idle": idle}
    times = measure_modules(call, modules, rounds=3)
    assert times == {"model": 2, "twice": 2, "parts": 5}
    assert not twice._forward_hooks and not twice._forward_pre_hooks
