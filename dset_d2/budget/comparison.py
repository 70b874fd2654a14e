"""Controllers beside each other under one budget after the other: what their choices are worth, and
what they take by the clock."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from ..analysis import measure
from ..analysis.latency import synchronised_time
from .controller import (
    BestStatic,
    Controller,
    QualityRegression,
    TwoStagePolicy,
    feasible_settings,
    matched_random,
    oracle,
    run_within,
    save_controller,
)
from .grpo import GRPO, GRPOConfig
from .latency_table import LatencyTable
from .outcomes import Outcomes
from .reward import REWARDS

CURVES = ("reward", "quality", "zero_variance", "entropy", "divergence", "utilisation")
COLOURS = dict(zip(REWARDS, ("C0", "C1")))

# Of outcomes under one setting (N,) per item, in percent.
Score = Callable[[Outcomes, Tensor], float]


def spaced_budgets(table: LatencyTable, count: int) -> tuple[list[float], list[float]]:
    """Budgets in milliseconds that controllers are trained for, and those half way between them,
    which they are not; evenly by their logarithms, over the table's range."""
    low, high = table.range()
    both = np.geomspace(1.02 * low, 1.02 * high, 2 * count - 1).tolist()
    return both[::2], both[1::2]


def teach(
    taught: Outcomes, budgets: Sequence[float], folder: Path, config: GRPOConfig
) -> dict[str, Controller]:
    """Controllers by name, of items that ran under all settings; GRPO's policy once per reward.

    Their weights, and GRPO's curves, are kept in the folder; a training that has ended is not
    repeated.

    Args:
        budgets: that GRPO draws from.
    """
    controllers: dict[str, Controller] = {
        "static": BestStatic.fit(taught),
        "regression": QualityRegression.fit(taught),
    }
    config, ends = replace(config, budgets=tuple(budgets)), (min(budgets), max(budgets))
    for name, reward in REWARDS.items():
        torch.manual_seed(config.seed)
        grpo = GRPO(TwoStagePolicy.start(taught, ends), taught, ends, config, reward())
        if (folder / name / "grpo.pth").exists():
            grpo.load(folder / name)
        controllers["GRPO" if name == "quality" else f"GRPO, {name}"] = grpo.train()
        grpo.save(folder / name)
    for name, controller in controllers.items():
        save_controller(folder / f"{name}.pth", controller)
    return controllers


def compare(
    outcomes: Outcomes,
    controllers: Mapping[str, Controller],
    budgets: tuple[Sequence[float], Sequence[float]],
    seed: int,
    score: Score,
    timed: int | None = None,
) -> list[dict]:
    """A row for each budget and each who chooses: the controllers, a random choice with GRPO's mix
    of settings, an oracle that knows all qualities, and the full setting.

    Args:
        outcomes: of items that nobody has learned from, under all settings.
        budgets: those that controllers have learned for, and others.
        timed: how many items are timed; None: all.
    """
    rows, (seen, unseen) = [], budgets
    everything = torch.arange(len(outcomes.items))
    for budget in tqdm(sorted([*seen, *unseen]), desc="budgets", leave=False, disable=None):
        chosen = choices(outcomes, controllers, budget, seed)
        for name, times in time_choices(outcomes, controllers, chosen, budget, timed).items():
            settings = chosen[name]
            row = {
                "seed": seed,
                "budget": budget,
                "seen": budget in seen,
                "who": name,
                "score": score(outcomes, settings),
                "quality": float(outcomes.quality[everything, settings].mean()),
                "expected_ms": float(outcomes.p50[everything, settings].mean()),
                "measured_ms": float(times.mean()),
                "p95_ms": float(np.percentile(times, 95)),
                "violations": float((times > budget).mean()),
                "utilisation": float(times.mean() / budget),
                "settings": int(settings.unique().numel()),
            }
            rows.append(row)
    return rows


def choices(
    outcomes: Outcomes, controllers: Mapping[str, Controller], budget: float, seed: int
) -> dict[str, Tensor]:
    """The settings (N,) of the items, by who chose them."""
    count = len(outcomes.items)
    items, budgets = torch.arange(count), torch.full((count,), budget)
    chosen = {name: c.decide(outcomes, items, budgets) for name, c in controllers.items()}
    generator = torch.Generator().manual_seed(seed)
    chosen["random"] = matched_random(chosen["GRPO"], outcomes.p95, generator)
    feasible = feasible_settings(outcomes.p95, budgets)
    chosen["oracle"] = oracle(outcomes.quality, outcomes.p50, feasible)
    chosen["full"] = torch.zeros(count, dtype=torch.long)
    return chosen


def time_choices(
    outcomes: Outcomes,
    controllers: Mapping[str, Controller],
    chosen: Mapping[str, Tensor],
    budget: float,
    timed: int | None = None,
) -> dict[str, np.ndarray]:
    """Milliseconds (n,) of each who chooses, taking turns; controllers decide while they are timed.

    Args:
        timed: n, items that lie evenly among all.
    """
    subject, count = outcomes.subject, len(outcomes.items)
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for index in np.linspace(0, count - 1, min(timed or count, count)).astype(int):
        item = outcomes.items[index]
        for name, settings in chosen.items():
            if name in controllers:
                found = run_within(subject, outcomes.table, controllers[name], item, budget)
                times[name].append(found.milliseconds)
            else:
                setting = outcomes.space.settings[int(settings[index])]
                start = synchronised_time()
                subject.finish(subject.begin(item, setting), setting)
                times[name].append(1e3 * (synchronised_time() - start))
    return {name: np.array(values) for name, values in times.items()}


def overhead(outcomes: Outcomes, controllers: Mapping[str, Controller]) -> dict[str, float]:
    """Median share of the full setting's latency that the decisions for one item take."""
    budget = torch.tensor([outcomes.table.range()[1]])
    feasible = feasible_settings(outcomes.p95[:1], budget)
    item, features = outcomes.items[0], outcomes.look(torch.tensor([0]))[0]

    def decide(controller: Controller) -> None:
        tier = controller.choose_tier(outcomes.subject.known(item)[None], budget, feasible)
        controller.choose(features[tier], tier, budget, feasible)

    calls = {name: lambda c=c: decide(c) for name, c in controllers.items()}
    full = float(outcomes.p50[0, 0])
    return {name: 1e3 * x.median / full for name, x in measure(calls, 100, 10).items()}


# What it comes to.


def means(rows: Sequence[dict], keys: Sequence[str], values: Sequence[str]) -> list[dict]:
    """Means of the values over rows with equal keys, which are those of different seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, key)) | {v: float(np.mean([row[v] for row in group])) for v in values}
        for key, group in groups.items()
    ]


def conclusions(rows: Sequence[dict], tolerance: float = 0.1) -> list[dict]:
    """A row for each who chooses.

    ``to_static`` is how far its score is from the best static setting's, the mean over budgets and
    seeds, ``spread`` the difference between seeds of that, and ``least`` the worst budget's mean
    over seeds. ``saved`` is the share of the full setting's latency that is saved at the least
    latency at which the mean score comes within ``tolerance`` of the full setting's; None: nowhere.
    """
    static = {(row["seed"], row["budget"]): row["score"] for row in rows if row["who"] == "static"}
    gains = [row | {"gain": row["score"] - static[row["seed"], row["budget"]]} for row in rows]
    by_budget = means(gains, ("who", "budget"), ("gain", "score", "measured_ms"))
    by_seed = means(gains, ("who", "seed"), ("gain",))
    values = ("score", "measured_ms", "violations")
    overall = {row["who"]: row for row in means(rows, ("who",), values)}
    whole, found = overall["full"], []
    for who, mean in overall.items():
        seeds = [row["gain"] for row in by_seed if row["who"] == who]
        own = [point for point in by_budget if point["who"] == who]
        equal = [p["measured_ms"] for p in own if p["score"] >= whole["score"] - tolerance]
        found.append(
            {
                "who": who,
                "to_static": float(np.mean(seeds)),
                "spread": max(seeds) - min(seeds),
                "least": min(point["gain"] for point in own),
                "saved": 1 - min(equal) / whole["measured_ms"] if equal else None,
                "violations": mean["violations"],
            }
        )
    return found


def draw_tradeoff(rows: Sequence[dict], score: str) -> Figure:
    """The score, called so, against measured latency: a point for each budget; those that nobody
    was trained for are hollow."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    points = means(rows, ("who", "budget", "seen"), ("measured_ms", "score"))
    for who in dict.fromkeys(point["who"] for point in points):
        own = sorted((p for p in points if p["who"] == who), key=lambda p: p["measured_ms"])
        if who == "full":
            axes.plot(own[0]["measured_ms"], own[0]["score"], "k*", markersize=12, label=who)
            continue
        (line,) = axes.plot([p["measured_ms"] for p in own], [p["score"] for p in own], label=who)
        for point in own:
            fill = line.get_color() if point["seen"] else "white"
            place = point["measured_ms"], point["score"]
            axes.plot(*place, "o", color=line.get_color(), markerfacecolor=fill)
    axes.set(xlabel="measured latency, mean, ms", ylabel=f"{score}, %")
    axes.legend()
    return figure


def draw_curves(folders: Sequence[Path]) -> Figure:
    """The curves of GRPO, of the folders of :func:`teach`."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, CURVES):
        for folder in folders:
            for reward, colour in COLOURS.items():
                history = json.loads((folder / reward / "grpo.json").read_text())
                values = np.array([row[name] for row in history])
                window = max(1, len(values) // 30)
                smooth = np.convolve(values, np.ones(window) / window, "valid")
                axes.plot(smooth, color=colour, linewidth=0.8)
        axes.set_title(name)
    figure.suptitle("GRPO by step, one line per seed; blue: quality, orange: the notes' reward")
    return figure
