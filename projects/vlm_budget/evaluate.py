"""A vision-language model within latency budgets: draws scenes, trains, measures, evaluates.

    python projects/vlm_budget/evaluate.py
    ... --smoke    # the same at a size that learns nothing, to see that it runs

A 16-block Qwen3-VL-MoE learns to answer questions about generated scenes under random settings of
its knobs. Its latencies are measured on this machine; on questions that it was not trained on,
controllers learn to choose settings; and on others, accuracy, latency and violations are compared.
What exists in the output folder is used again: scenes, network, latency table and what was run.
"""

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from answering import (
    LabelledImage,
    Recipe,
    Size,
    answer_packed,
    build_model,
    draw_scenes,
    finish_packed,
    make_items,
    pack,
    train,
)
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from dset_d2.budget import (
    GRPO,
    BestStatic,
    Controller,
    GRPOConfig,
    LatencyTable,
    NotesReward,
    Outcomes,
    QualityRegression,
    QualityReward,
    TwoStagePolicy,
    feasible_settings,
    matched_random,
    measure_table,
    oracle,
)
from dset_d2.budget.language import LanguageSubject, Question, Qwen3VLMoE
from dset_d2.files import write_atomically
from dset_d2.synthetic.questions import KINDS, TextQuestion

Items = Sequence[tuple[Question, TextQuestion]]


@dataclass(frozen=True)
class Study:
    """How large everything is.

    Attributes:
        scenes: for training, for controllers and for evaluation.
        image_tokens, top_k, blocks: values of the knobs.
        rounds: how often each setting is timed, twice.
        budgets: how many between the fastest and the slowest setting; as many less one lie
            between them that no controller was trained with.
        grpo_steps, grpo_seeds: of GRPO; each seed is a training.
        timed: questions that are timed at each budget.
    """

    size: Size
    scenes: tuple[int, int, int]
    image_tokens: tuple[int, ...]
    top_k: tuple[int, ...]
    blocks: tuple[int, ...]
    recipe: Recipe
    rounds: int
    budgets: int
    grpo_steps: int
    grpo_seeds: int
    timed: int


FULL = Study(
    size=Size(256, 64, 16, 8, 16, 128, 4, (192, 288)),
    scenes=(1000, 200, 200),
    image_tokens=(54, 24, 6),
    top_k=(8, 4, 2),
    blocks=(16, 10, 4),
    recipe=Recipe(vision_steps=3000, answer_steps=600, shallow=0.7, batch=4),
    rounds=15,
    budgets=6,
    grpo_steps=400,
    grpo_seeds=3,
    timed=40,
)
SMOKE = Study(
    size=Size(64, 16, 8, 4, 6, 32, 3, (64, 96)),
    scenes=(6, 5, 5),
    image_tokens=(6, 2),
    top_k=(4, 2),
    blocks=(6, 4),
    recipe=Recipe(vision_steps=2, answer_steps=3, shallow=0.4, batch=2),
    rounds=2,
    budgets=2,
    grpo_steps=2,
    grpo_seeds=1,
    timed=1,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/vlm_budget"))
    parser.add_argument("--smoke", action="store_true", help="tiny, for a look at whether it runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    study, folder = SMOKE if args.smoke else FULL, args.output
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    if not (folder / "network.pt").exists():  # what another one answered is of no use
        for name in ("fit", "test"):
            (folder / f"{name}.npz").unlink(missing_ok=True)
    groups = draw_scenes(folder / "scenes.pt", study.scenes, study.size.image, args.seed)
    network, trained = prepare_network(study, folder / "network.pt", groups[0], args.seed)
    subject = LanguageSubject(network, study.image_tokens, study.top_k, study.blocks)
    fit, test = (make_items(scenes, args.seed + n) for n, scenes in enumerate(groups[1:], 1))
    table = prepare_table(
        subject, [item for item, _ in (*fit, *test)], folder / "table.json", study
    )
    outcomes = {
        name: fill(Outcomes(subject, [i for i, _ in items], table, folder / f"{name}.npz"), items)
        for name, items in (("fit", fit), ("test", test))
    }
    low, high = table.range()
    ends = low * 1.001, high * 1.001
    steps = 2 * study.budgets - 1
    budgets = [ends[0] * (ends[1] / ends[0]) ** (n / (steps - 1)) for n in range(steps)]
    controllers = train_controllers(outcomes["fit"], tuple(budgets[::2]), study)
    results = {
        "study": asdict(study),
        "trained": trained,
        "kinds": by_kind(outcomes["test"], test, majority(fit, test)),
        "table": table.about | {"dropped": table.dropped, "rounds": study.rounds},
        "settings": describe_settings(outcomes["test"]),
        "rows": [
            row | {"seen": n % 2 == 0}
            for n, budget in enumerate(budgets)
            for row in compare(outcomes["test"], controllers, budget, study.timed, args.seed)
        ],
    }
    text = json.dumps(results, indent=1)
    write_atomically(folder / "results.json", lambda file: file.write(text.encode()))
    (folder / "report.md").write_text(report(results))
    draw(results).savefig(folder / "accuracy.png", dpi=120)
    print(report(results))
    print(f"written: {folder}/report.md, results.json, accuracy.png, table.json, network.pt")


# The network and its times.


def prepare_network(
    study: Study, file: Path, scenes: Sequence[LabelledImage], seed: int
) -> tuple[Qwen3VLMoE, dict]:
    """The trained network, and what its training said; from the file if that is of this study.

    Raises:
        ValueError: if the file is of another one.
    """
    torch.manual_seed(seed)
    network = Qwen3VLMoE(build_model(study.size).to(device()))
    knobs = study.image_tokens, study.top_k, study.blocks
    recipe = repr((study.size, study.scenes, knobs, study.recipe, seed))
    if file.exists():
        content = torch.load(file, weights_only=True, map_location=network.model.device)
        if content["recipe"] != recipe:
            raise ValueError(f"{file} is of another training, {content['recipe']}; move it away")
        network.model.load_state_dict(content["weights"])
        network.model.eval()
        return network, content["trained"]
    print("training the network")
    subject = LanguageSubject(network, study.image_tokens, study.top_k, study.blocks)
    trained = train(network, scenes, subject.settings, study.recipe, seed)
    content = {"recipe": recipe, "trained": trained, "weights": network.model.state_dict()}
    write_atomically(file, lambda target: torch.save(content, target))
    return network, trained


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_table(
    subject: LanguageSubject, items: Sequence[Question], file: Path, study: Study
) -> LatencyTable:
    """The latency table, of the shortest and the longest question; from the file if it exists."""
    if file.exists():
        return LatencyTable.load(file)
    ends = [choose(items, key=lambda item: len(item.prompt)) for choose in (min, max)]
    table = measure_table(subject, ends, study.rounds, warmup=min(3, study.rounds))
    table.save(file)
    return table


@torch.no_grad()
def fill(outcomes: Outcomes, items: Items, batch: int = 16) -> Outcomes:
    """Run all questions under all settings, in batches; what they are worth is the same alone."""
    if outcomes.quality.isfinite().all():
        return outcomes
    network, space = outcomes.subject.network, outcomes.space
    for tier, tokens in enumerate(space.tiers):
        for start in range(0, len(items), batch):
            chunk = items[start : start + batch]
            images = [item.image for item, _ in chunk]
            packed = pack(network, images, [[asked] for _, asked in chunk], tokens)
            begun = network.begin(**packed.to(network.model.device).inputs)
            features = begun.features_at(packed.columns)
            if outcomes.features is None:
                shape = len(items), len(space.tiers), features.shape[1]
                outcomes.features = torch.full(shape, torch.nan)
            outcomes.features[start : start + batch, tier] = features
            for index in space.members[tier].nonzero().flatten().tolist():
                logits = finish_packed(network, begun, packed, space.settings[index])
                right = (logits.argmax(-1).cpu() == packed.answers).float()
                outcomes.quality[start : start + batch, index] = right
    outcomes.save()
    return outcomes


# Controllers.


def train_controllers(
    outcomes: Outcomes, budgets: tuple[float, ...], study: Study
) -> dict[str, list[Controller]]:
    """By name, one or several of different seeds."""
    rewards = {"GRPO": QualityReward(), "GRPO, notes": NotesReward()}
    found: dict[str, list[Controller]] = {
        "static": [BestStatic.fit(outcomes)],
        "regression": [QualityRegression.fit(outcomes)],
    }
    for name, reward in rewards.items():
        for seed in range(study.grpo_seeds):
            torch.manual_seed(seed)
            policy = TwoStagePolicy.start(outcomes, (budgets[0], budgets[-1]))
            config = GRPOConfig(steps=study.grpo_steps, group_size=5, budgets=budgets, seed=seed)
            trainer = GRPO(policy, outcomes, (budgets[0], budgets[-1]), config, reward)
            found.setdefault(name, []).append(trainer.train())
    return found


# Evaluation.


def compare(
    outcomes: Outcomes,
    controllers: Mapping[str, Sequence[Controller]],
    budget: float,
    timed: int,
    seed: int,
) -> list[dict]:
    """A row for each controller, GRPO's mix dealt at random, the oracle and the full setting.

    ``accuracy`` is over all questions and seeds, ``expected`` the table's mean latency; what is
    ``measured``, in milliseconds, and ``violations`` are over the timed questions, of the first
    seed.
    """
    count = len(outcomes.items)
    everything, limits = torch.arange(count), torch.full((count,), budget)
    chosen = {
        name: [controller.decide(outcomes, everything, limits) for controller in seeds]
        for name, seeds in controllers.items()
    }
    generator = torch.Generator().manual_seed(seed)
    chosen["random"] = [matched_random(x, outcomes.p95, generator) for x in chosen["GRPO"]]
    feasible = feasible_settings(outcomes.p95, limits)
    chosen["oracle"] = [oracle(outcomes.quality, outcomes.p50, feasible)]
    chosen["full"] = [torch.zeros(count, dtype=torch.long)]
    times = clock(outcomes, controllers, budget, timed, seed)
    rows = []
    for name, seeds in chosen.items():
        right = [outcomes.quality[everything, settings].mean().item() for settings in seeds]
        expected = [outcomes.p50[everything, settings].mean().item() for settings in seeds]
        row = {
            "budget": budget,
            "controller": name,
            "accuracy": statistics.fmean(right),
            "spread": max(right) - min(right),
            "expected": statistics.fmean(expected),
        }
        if found := times.get(name):
            row |= {
                "measured": statistics.fmean(whole for whole, _ in found),
                "violations": statistics.fmean(whole > budget for whole, _ in found),
                "overhead": statistics.median(own / whole for whole, own in found),
            }
        rows.append(row)
    return rows


def clock(
    outcomes: Outcomes,
    controllers: Mapping[str, Sequence[Controller]],
    budget: float,
    timed: int,
    seed: int,
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of whole answers, and of what the controller's part in them is.

    Controllers take turns. What the table says of a question is looked up before.
    """
    rng = random.Random(seed)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in controllers}
    limit = torch.tensor([budget])
    for index in rng.sample(range(len(outcomes.items)), min(timed, len(outcomes.items))):
        feasible = feasible_settings(outcomes.p95[index : index + 1], limit)
        for name in rng.sample(list(controllers), len(controllers)):
            times = answer(outcomes, controllers[name][0], index, limit, feasible)
            found[name].append(times)
    return found


def answer(
    outcomes: Outcomes, controller: Controller, index: int, limit: Tensor, feasible: Tensor
) -> tuple[float, float]:
    """Run a question under what a controller chooses: milliseconds, and the controller's."""
    subject, space, item = outcomes.subject, outcomes.space, outcomes.items[index]
    marks = [now()]
    tier = controller.choose_tier(subject.known(item)[None], limit, feasible)
    marks.append(now())
    state = subject.begin(item, space.first(int(tier)))
    marks.append(now())
    setting = controller.choose(state.features[None], tier, limit, feasible)
    marks.append(now())
    subject.finish(state, space.settings[int(setting)])
    marks.append(now())
    return marks[4] - marks[0], marks[1] - marks[0] + marks[3] - marks[2]


def now() -> float:
    """Milliseconds, once the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


# What is reported.


def majority(fit: Items, test: Items) -> list[bool]:
    """Whether each question's answer is the commonest one of its kind."""
    common: dict[str, Counter] = {}
    for _, asked in fit:
        common.setdefault(asked.kind, Counter()).update([asked.answer])
    return [
        asked.kind in common and common[asked.kind].most_common(1)[0][0] == asked.answer
        for _, asked in test
    ]


def by_kind(outcomes: Outcomes, items: Items, majority: Sequence[bool]) -> list[dict]:
    """For each kind of question, and all: accuracies of the commonest answer, of the full setting,
    and of those with one knob, or all, at the smallest value."""
    settings = outcomes.space.settings
    full, smallest = settings[0], settings[-1]
    chosen = {name: full | {name: smallest[name]} for name in full}
    columns = {"commonest": torch.tensor(majority).float()}
    for name, setting in {"full": full, **chosen, "smallest": smallest}.items():
        columns[name] = outcomes.quality[:, settings.index(setting)]
    rows = []
    for kind in (*KINDS, "all"):
        of_kind = torch.tensor([kind in ("all", asked.kind) for _, asked in items])
        if count := int(of_kind.sum()):
            means = {name: column[of_kind].mean().item() for name, column in columns.items()}
            rows.append({"questions": kind, "count": count} | means)
    return rows


def describe_settings(outcomes: Outcomes) -> list[dict]:
    quality, p50, p95 = (x.mean(0).tolist() for x in (outcomes.quality, outcomes.p50, outcomes.p95))
    return [
        {**setting, "accuracy": q, "p50": a, "p95": b}
        for setting, q, a, b in zip(outcomes.space.settings, quality, p50, p95)
    ]


def report(results: Mapping) -> str:
    """Markdown."""
    about, trained = results["table"], results["trained"]
    dropped = ", ".join(f"{name} ({share:.1%})" for name, share in about["dropped"].items())
    lines = [
        f"{trained['parameters'] / 1e6:.1f} M parameters, trained in {trained['minutes']:.1f} min; "
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}.",
        f"Repeated measurements differ by {about['error']['median']:.1%} (median), "
        f"{about['error']['largest']:.1%} at most. Knobs that the table dropped: "
        f"{dropped or 'none'}.",
        "",
        "Accuracies of the commonest answer, the full setting, one knob or all at the least:",
        "",
        tabulate(results["kinds"], headers="keys", floatfmt=".3f", tablefmt="github"),
        "",
        tabulate(results["settings"], headers="keys", floatfmt=".3g", tablefmt="github"),
        "",
        tabulate(results["rows"], headers="keys", floatfmt=".3f", tablefmt="github"),
        "",
    ]
    return "\n".join(lines)


def draw(results: Mapping) -> Figure:
    """Accuracy against latency: every setting, and each controller over the budgets."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    settings = results["settings"]
    axes.scatter(
        [s["p50"] for s in settings], [s["accuracy"] for s in settings], c="0.8", label="settings"
    )
    rows = results["rows"]
    for name in dict.fromkeys(row["controller"] for row in rows):
        if name == "full":
            continue
        own = [row for row in rows if row["controller"] == name]
        times, right = [row["expected"] for row in own], [row["accuracy"] for row in own]
        axes.plot(times, right, marker=".", label=name)
    axes.set(xlabel="mean latency by the table, ms", ylabel="accuracy on unseen scenes")
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
