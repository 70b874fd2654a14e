import time

import pytest
import torch
from torch import nn

from dset_d2.analysis import measure, measure_modules


def test_callables_take_turns():
    calls = []
    latencies = measure({name: lambda n=name: calls.append(n) for name in "abc"}, 2, 1)
    assert calls == list("abc" * 3)
    assert list(latencies) == list("abc")


def test_ratios_are_those_of_the_rounds():
    # Every round of the second takes twice as long as the first, however slow the round is.
    pace = iter([1, 1, 9, 9, 3, 3, 1, 1, 1, 1])
    latencies = measure(
        {
            "first": lambda: time.sleep(0.01 * next(pace)),
            "second": lambda: time.sleep(0.02 * next(pace)),
        },
        rounds=4,
        warmup=1,
    )
    first, second = latencies["first"], latencies["second"]
    assert first.ratio == 1 and first.ratio_quartiles == (1, 1)
    assert second.ratio == pytest.approx(2, rel=0.2)
    assert first.quartiles[0] <= first.median <= first.quartiles[1]
    assert first.median == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("rounds, warmup", [(0, 1), (1, -1)])
def test_impossible_rounds(rounds, warmup):
    with pytest.raises(ValueError, match=f"rounds={rounds} .* warmup={warmup}"):
        measure({"a": int}, rounds, warmup)


class Sleep(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def test_modules_are_timed_over_all_their_calls():
    twice, parts, idle = Sleep(0.01), nn.ModuleList([Sleep(0.01), Sleep(0.02)]), Sleep(1)
    model = nn.Sequential(twice, twice)

    def call():
        x = model(torch.zeros(1))
        for part in parts:
            x = part(x)

    times = measure_modules(
        call, {"model": model, "twice": twice, "parts": parts, "idle": idle}, rounds=3
    )
    assert times.keys() == {"model", "twice", "parts"}
    assert times["twice"] == pytest.approx(0.02, rel=0.3)
    assert times["parts"] == pytest.approx(0.03, rel=0.3)
    assert not twice._forward_hooks and not twice._forward_pre_hooks
