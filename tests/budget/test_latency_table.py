"""How long settings take: measured, interpolated, refused where it is of something else."""

import pytest
import torch
from torch import nn

from dset_d2.analysis import latency
from dset_d2.budget import LatencyTable, fingerprint, grid, measure_table
from dset_d2.budget.latency_table import coordinate, drop_knobs

from .toy import COST, Item, State, Toy, table

ITEM = Item(False, False)


class Timed(Toy):
    """Work takes what :data:`COST` says of a clock that nothing else moves; a third knob changes
    1 % of it."""

    settings = grid({"size": (2, 1), "depth": (2, 1), "idle": (2, 1)})
    now, pace = 0.0, 1.0

    def finish(self, state: State, setting):
        share = 1 if setting["idle"] == 2 else 0.99
        self.now += 1e-3 * self.pace * share * COST[setting["size"], setting["depth"]]
        return super().finish(state, setting)


@pytest.fixture
def subject(monkeypatch) -> Timed:
    subject = Timed()
    monkeypatch.setattr(latency, "synchronised_time", lambda: subject.now)
    return subject


def test_all_settings_take_turns_and_idle_knobs_are_dropped(subject, tmp_path):
    found = measure_table(subject, [ITEM, Item(True, True)], rounds=4, warmup=1)
    assert subject.finished == (2 * 4 + 1) * 8  # one of the items of each shape
    assert list(found.dropped) == ["idle"] and found.dropped["idle"] == pytest.approx(0.01, 1e-4)
    assert [s["idle"] for s in found.settings] == [2] * 4
    assert found.settings[0] == {"size": 2, "depth": 2, "idle": 2}
    p50, p95 = found.of(subject, ITEM)
    assert p50.tolist() == pytest.approx(list(COST.values())) == p95.tolist()
    assert found.about["error"]["largest"] < 1e-6 and found.about["rounds"] == 4
    assert found.range() == pytest.approx((10, 40))
    found.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    assert again == found
    again.check(subject)


def test_a_second_measurement_tells_the_error(subject, monkeypatch):
    looks = []

    def slower() -> float:
        looks.append(subject.now)
        if len(looks) == 2 * 8 * 3:  # those of the first measurement
            subject.pace = 1.1
        return subject.now

    monkeypatch.setattr(latency, "synchronised_time", slower)
    found = measure_table(subject, [ITEM], rounds=3, warmup=0)
    assert found.about["error"] == pytest.approx({"median": 0.1, "largest": 0.1})


def test_tables_of_something_else_are_refused(monkeypatch):
    found, other = table(), Toy()
    found.check(other)
    monkeypatch.setattr(other, "fingerprint", lambda: "another")
    with pytest.raises(ValueError, match=r"of another model toy \(here another\); measure it anew"):
        found.check(other)
    threads = torch.get_num_threads() + 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with pytest.raises(ValueError, match=rf"another threads {threads - 1} \(here {threads}\); mea"):
        found.check(Toy())


def test_times_between_shapes():
    found = table()
    for size, depth in COST:
        setting = {"size": size, "depth": depth}
        p50, p95 = found.lookup(f"1x3x{size}x1", setting)
        assert (p50, p95) == (COST[size, depth], 1.05 * COST[size, depth])
    wide = LatencyTable(
        found.about,
        found.settings,
        "size",
        {(f"1x3x{side}x{side}", ()): times for side, times in ((10, (1, 2)), (20, (4, 8)))},
    )
    assert wide.lookup("1x3x10x25", {"size": 1}) == pytest.approx((2.5, 5))
    for shape in ("1x3x10x9", "1x3x20x21", "2x3x10x25", "one image"):
        with pytest.raises(ValueError, match=f"'{shape}' was not measured, nor lies between .* 1x"):
            wide.lookup(shape, {"size": 1})


def test_shapes_that_can_be_compared():
    assert coordinate("2x3x40x60") == ("2x3", 2400)
    assert coordinate("image 256, 24 tokens") == ("image 256, * tokens", 24)
    assert coordinate("image 512, 24 tokens")[0] != coordinate("image 256, 32 tokens")[0]
    assert coordinate("text") == ("text", 0)


def test_the_least_knob_goes_first_and_others_are_looked_at_again():
    """Either of two knobs alone changes little, but not when the other is gone."""
    settings = grid({"a": (2, 1), "b": (2, 1)})
    times = torch.tensor([[100.0, 99.0, 98.0, 97.1]]).numpy()
    left, dropped = drop_knobs(settings, times, least=0.015)
    assert left == [{"a": 2, "b": 2}, {"a": 1, "b": 2}] and list(dropped) == ["b"]
    left, dropped = drop_knobs(settings, times, least=0.03)
    assert left == [{"a": 2, "b": 2}] and list(dropped) == ["b", "a"]


def test_fingerprints_are_of_architectures_not_of_weights():
    first = fingerprint(nn.Linear(3, 4), "x")
    assert first == fingerprint(nn.Linear(3, 4), "x")
    others = [fingerprint(nn.Linear(4, 3), "x"), fingerprint(nn.Linear(3, 4), "y")]
    assert len({first, *others}) == 3


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "x.json").write_text('{"settings": []}')
    with pytest.raises(ValueError, match="x.json: not a latency table"):
        LatencyTable.load(tmp_path / "x.json")
