"""How long a model takes under each of its settings on one device: measured, never guessed."""

import hashlib
import json
import platform
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..analysis.latency import device_name, sample_times
from ..files import write_atomically
from .subject import Key, Setting, Space, Subject, key_of

LEAST_SPAN = 0.03  # share of the latency; a knob that changes less of it is dropped
IMAGES = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)")
LAST_NUMBER = re.compile(r"(.*?)(\d+)(\D*)", re.DOTALL)


class Times(NamedTuple):
    """Milliseconds."""

    p50: float
    p95: float


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of a subject's settings.

    Attributes:
        about: ``model`` (its fingerprint), ``device``, ``threads`` and ``torch``, with which it
            was measured; ``rounds``; ``spans``, the shares of the latency that the knobs change;
            ``error``, between two measurements (:func:`repeatability`);
            ``subject``, how to make it of its model again.
        settings: those that are left, the full one first.
        tier: the knob that decides the shape.
        times: by shape and by the setting without its tier.
        dropped: knobs that stay at the full setting's value, with the share of the latency that
            they change.
        rows: what was looked up before, by the shapes of the tiers.
    """

    about: dict[str, Any]
    settings: list[dict]
    tier: str
    times: dict[tuple[str, Key], Times]
    dropped: dict[str, float] = field(default_factory=dict)
    rows: dict[tuple[str, ...], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def space(self) -> Space:
        """The settings as what controllers choose among."""
        return Space(self.settings, self.tier)

    def check(self, subject: Subject) -> None:
        """Raise a ``ValueError`` unless the table is of this model, device and threads."""
        here = surroundings(subject)
        wrong = [
            f"{name} {self.about[name]} (here {value})"
            for name, value in here.items()
            if name != "torch" and self.about[name] != value
        ]
        if wrong:
            raise ValueError(
                f"the latency table is of another {' and '.join(wrong)}; measure it anew: "
                "python -m dset_d2.tools.latency_table"
            )

    def lookup(self, shape: str, setting: Setting) -> Times:
        """The times of a setting, between measured shapes by what these differ in.

        Raises:
            ValueError: for a shape that neither was measured nor lies between such.
        """
        rest = key_of({k: v for k, v in setting.items() if k != self.tier})
        if found := self.times.get((shape, rest)):
            return found
        group, size = coordinate(shape)
        near = []
        for (other, key), times in self.times.items():
            if key == rest and coordinate(other)[0] == group:
                near.append((coordinate(other)[1], *times))
        near.sort()
        if not near or not near[0][0] <= size <= near[-1][0]:
            shapes = ", ".join(dict.fromkeys(shape for shape, _ in self.times))
            raise ValueError(f"{shape!r} was not measured, nor lies between what was: {shapes}")
        sizes, p50, p95 = np.array(near).T
        return Times(float(np.interp(size, sizes, p50)), float(np.interp(size, sizes, p95)))

    def of(self, subject: Subject, item: Any) -> tuple[Tensor, Tensor]:
        """The p50 and the p95 (S,) of all settings for an item, in milliseconds."""
        examples = {setting[self.tier]: setting for setting in self.settings}
        shapes = {tier: subject.shape(item, setting) for tier, setting in examples.items()}
        found = tuple(shapes.values())
        if found not in self.rows:
            times = [self.lookup(shapes[s[self.tier]], s) for s in self.settings]
            self.rows[found] = torch.tensor(times).T
        p50, p95 = self.rows[found]
        return p50, p95

    def range(self) -> tuple[float, float]:
        """The least p95 of all, and the largest, in milliseconds."""
        p95 = [times.p95 for times in self.times.values()]
        return min(p95), max(p95)

    def save(self, path: Path) -> None:
        """As JSON."""
        rows = [
            {"shape": shape, "setting": dict(rest), "p50": times.p50, "p95": times.p95}
            for (shape, rest), times in self.times.items()
        ]
        content: dict[str, Any] = {"about": self.about, "tier": self.tier, "dropped": self.dropped}
        content |= {"settings": self.settings, "milliseconds": rows}
        text = json.dumps(content, indent=1)
        write_atomically(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Raises a ``ValueError`` that names the file if it is no such table."""
        try:
            content = json.loads(Path(path).read_text())
            times = {
                (row["shape"], key_of(row["setting"])): Times(row["p50"], row["p95"])
                for row in content["milliseconds"]
            }
            about, settings = content["about"], content["settings"]
            return cls(about, settings, content["tier"], times, content["dropped"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a latency table ({error})") from error


def fingerprint(model: nn.Module, *settings: Any) -> str:
    """The same for models whose parameters have the same names and shapes, and equal settings."""
    shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
    text = json.dumps([sorted(shapes), *map(str, settings)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def surroundings(subject: Subject) -> dict[str, Any]:
    """What latencies are of."""
    return {
        "model": subject.fingerprint(),
        "device": device_name(subject.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def coordinate(shape: str) -> tuple[str, float]:
    """What two shapes must share to be interpolated between, and where each of them stands.

    Images of one batch size stand by their pixels, other texts by the last number in them.
    """
    if match := IMAGES.fullmatch(shape):
        batch, channels, height, width = match.groups()
        return f"{batch}x{channels}", float(height) * float(width)
    if match := LAST_NUMBER.fullmatch(shape):
        before, number, after = match.groups()
        return f"{before}*{after}", float(number)
    return shape, 0.0


def measure_table(
    subject: Subject, items: Sequence[Any], rounds: int = 30, warmup: int = 5
) -> LatencyTable:
    """Measure all settings in turn, and drop the knobs that change little.

    Args:
        items: one of each shape is run; a shape is that of an item and a setting.
        rounds: each is timed twice as often; the halves tell how far a repeated measurement is off.
        warmup: rounds before that are not timed.
    """
    calls: dict[tuple[str, Key], Callable[[], object]] = {}
    for item in items:
        for setting in subject.settings:
            rest = key_of({k: v for k, v in setting.items() if k != subject.tier})
            calls.setdefault((subject.shape(item, setting), rest), runner(subject, item, setting))
    sampled = 1e3 * sample_times(list(calls.values()), 2 * rounds, warmup)
    measured = {
        place: Times(*np.percentile(x, (50, 95)).tolist()) for place, x in zip(calls, sampled.T)
    }
    about = surroundings(subject) | {
        "python": platform.python_version(),
        "rounds": rounds,
        "error": repeatability(sampled),
        "subject": subject.describe(),
    }
    settings = [dict(setting) for setting in subject.settings]
    table = LatencyTable(about, settings, subject.tier, measured)
    rows = torch.stack([table.of(subject, item)[0] for item in items])
    settings, dropped = drop_knobs(settings, rows.numpy())
    left = [table.settings.index(setting) for setting in settings]
    rows = rows[:, left]
    about["spans"] = {k: span(settings, rows.numpy(), k) for k in varied_knobs(settings)}
    kept = {key_of({k: v for k, v in s.items() if k != subject.tier}) for s in settings}
    shapes = {subject.shape(item, setting) for item in items for setting in settings}
    times = {k: v for k, v in measured.items() if k[0] in shapes and k[1] in kept}
    return LatencyTable(about, settings, subject.tier, times, dropped)


def runner(subject: Subject, item: Any, setting: Setting) -> Callable[[], object]:
    return lambda: subject.finish(subject.begin(item, setting), setting)


def repeatability(times: np.ndarray) -> dict[str, float]:
    """What share of a median (rounds, N) differs between the first half of the rounds and the
    second: the median over N, and the largest."""
    first, second = (np.median(half, axis=0) for half in np.array_split(times, 2))
    differences = np.abs(second / first - 1)
    return {"median": float(np.median(differences)), "largest": float(differences.max())}


def span(settings: Sequence[Setting], rows: np.ndarray, knob: str) -> float:
    """The share of the latency that a knob changes while all others stand still.

    The median over items, rows (I, S), and over what the others may be.
    """
    groups: dict[Key, list[int]] = defaultdict(list)
    for index, setting in enumerate(settings):
        groups[key_of({k: v for k, v in setting.items() if k != knob})].append(index)
    shares = [1 - rows[:, group].min(1) / rows[:, group].max(1) for group in groups.values()]
    return float(np.median(np.concatenate(shares)))


def drop_knobs(
    settings: Sequence[dict], rows: np.ndarray, least: float = LEAST_SPAN
) -> tuple[list[dict], dict[str, float]]:
    """The settings without those of knobs that change too little of the latencies (I, S).

    One knob after the other, the least first: what a knob changes may depend on others.

    Returns:
        The settings, in which such knobs stand as in the first; these knobs with their spans.
    """
    settings, dropped = list(settings), {}
    while varied := varied_knobs(settings):
        spans = {knob: span(settings, rows, knob) for knob in varied}
        knob = min(spans, key=lambda name: spans[name])
        if spans[knob] >= least:
            break
        dropped[knob] = spans[knob]
        kept = [i for i, setting in enumerate(settings) if setting[knob] == settings[0][knob]]
        settings, rows = [settings[i] for i in kept], rows[:, kept]
    return settings, dropped


def varied_knobs(settings: Iterable[Setting]) -> list[str]:
    """The knobs that have several values."""
    values = defaultdict(set)
    for setting in settings:
        for knob, value in setting.items():
            values[knob].add(value)
    return [knob for knob, seen in values.items() if len(seen) > 1]
