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
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from answering import (
    LabelledImage,
    Recipe,
    Size,
    build_model,
    draw_scenes,
    finish_packed,
    make_items,
    pack,
    train,
)
from tabulate import tabulate
from torch import Tensor

from dset_d2.budget import GRPOConfig, LatencyTable, Outcomes, measure_table
from dset_d2.budget.comparison import (
    compare,
    conclusions,
    draw_curves,
    draw_tradeoff,
    means,
    overhead,
    spaced_budgets,
    teach,
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
    timed=20,
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

    home = folder / "network"
    if not (home / "weights.pt").exists():
        # What another one answered, and who learned of it, is of no use.
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
    groups = draw_scenes(folder / "scenes.pt", study.scenes, study.size.image, args.seed)
    network, trained = prepare_network(study, home / "weights.pt", groups[0], args.seed)
    subject = LanguageSubject(network, study.image_tokens, study.top_k, study.blocks)
    fit, test = (make_items(scenes, args.seed + n) for n, scenes in enumerate(groups[1:], 1))
    table = prepare_table(
        subject, [item for item, _ in (*fit, *test)], folder / "table.json", study
    )
    outcomes = {
        name: fill(Outcomes(subject, [i for i, _ in items], table, home / f"{name}.npz"), items)
        for name, items in (("fit", fit), ("test", test))
    }
    rows, folders = [], [home / f"controllers_{seed}" for seed in range(study.grpo_seeds)]
    budgets = spaced_budgets(table, study.budgets)
    for seed, place in enumerate(folders):
        config = GRPOConfig(steps=study.grpo_steps, group_size=5, seed=seed)
        controllers = teach(outcomes["fit"], budgets[0], place, config)
        rows += compare(outcomes["test"], controllers, budgets, seed, accuracy, study.timed)
    results = {
        "study": asdict(study),
        "trained": trained,
        "kinds": by_kind(outcomes["test"], test, majority(fit, test)),
        "table": table.about | {"dropped": table.dropped, "rounds": study.rounds},
        "settings": describe_settings(outcomes["test"]),
        "rows": rows,
        "conclusions": conclusions(rows),
        "overhead": overhead(outcomes["test"], controllers),
    }
    text = json.dumps(results, indent=1)
    write_atomically(folder / "results.json", lambda file: file.write(text.encode()))
    (folder / "report.md").write_text(report(results))
    draw_tradeoff(rows, "accuracy").savefig(folder / "accuracy.png", dpi=120)
    draw_curves(folders).savefig(folder / "grpo.png", dpi=120)
    print(report(results))
    print(
        f"written: {folder}/report.md, results.json, accuracy.png, grpo.png, table.json, network/"
    )


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
            shares = {name: column[of_kind].mean().item() for name, column in columns.items()}
            rows.append({"questions": kind, "count": count} | shares)
    return rows


def describe_settings(outcomes: Outcomes) -> list[dict]:
    quality, p50, p95 = (x.mean(0).tolist() for x in (outcomes.quality, outcomes.p50, outcomes.p95))
    return [
        {**setting, "accuracy": q, "p50": a, "p95": b}
        for setting, q, a, b in zip(outcomes.space.settings, quality, p50, p95)
    ]


def accuracy(outcomes: Outcomes, settings: Tensor) -> float:
    """Percent of the questions that are answered rightly, each under its setting."""
    return 100 * outcomes.quality[torch.arange(len(settings)), settings].mean().item()


def report(results: Mapping) -> str:
    """Markdown."""
    about, trained = results["table"], results["trained"]
    dropped = ", ".join(f"{name} ({share:.1%})" for name, share in about["dropped"].items())
    spans = ", ".join(f"{name} {share:.1%}" for name, share in about["spans"].items())
    keys, values = ("budget", "seen", "who"), ("score", "measured_ms", "violations", "utilisation")
    lines = [
        f"{trained['parameters'] / 1e6:.1f} M parameters, trained in {trained['minutes']:.1f} min; "
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}.",
        f"Repeated measurements differ by {about['error']['median']:.1%} (median), "
        f"{about['error']['largest']:.1%} at most. Shares of the latency that knobs change: "
        f"{spans}; dropped: {dropped or 'none'}.",
        "Accuracies of the commonest answer, the full setting, one knob or all at the least:",
        tabulate(results["kinds"], headers="keys", floatfmt=".3f", tablefmt="github"),
        f"Decisions take these shares of the full latency: {results['overhead']}.",
        tabulate(results["settings"], headers="keys", floatfmt=".3g", tablefmt="github"),
        tabulate(
            means(results["rows"], keys, values), headers="keys", floatfmt=".3f", tablefmt="github"
        ),
        tabulate(results["conclusions"], headers="keys", floatfmt=".3f", tablefmt="github"),
    ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
