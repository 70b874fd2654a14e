"""One detector under latency budgets: trains it, measures it, trains who chooses its settings, and
compares them.

    OMP_NUM_THREADS=1 python projects/latency_budget/evaluate.py --output output/latency_budget

Draws scenes of mixed difficulty, trains a small supernet per seed, measures the latency table, runs
all settings on frames that the detector was not trained on, fits and trains controllers on some of
these, and evaluates on the others: AP against measured latency under seen and unseen budgets. What
is done is kept in the folder and not done again; --controls also trains what the supernet is to be
compared with. Writes results.json, tables.txt, tradeoff.png and grpo.png.

Latencies are of one device: nothing else should run on it meanwhile.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from dset_d2.analysis import measure
from dset_d2.analysis.latency import synchronised_time
from dset_d2.budget import (
    GRPO,
    REWARDS,
    BestStatic,
    Controller,
    DetectorSubject,
    GRPOConfig,
    LatencyTable,
    Outcomes,
    Predictor,
    QualityRegression,
    TwoStagePolicy,
    feasible_settings,
    matched_random,
    measure_table,
    oracle,
    save_controller,
)
from dset_d2.synthetic import write_dataset
from dset_d2.tools.common import (
    ToolParser,
    build,
    build_model,
    describe_device,
    entry_point,
    evaluated_names,
    image_size,
    load_weights,
    noise_image,
    read_config,
    write_json,
)
from dset_d2.tools.trainings import Run, claim, train

CONFIG = "projects/latency_budget/configs/vit_moe_roadside.py"
SCALES = (1.0, 0.75, 0.5)
# What the supernet is compared with, at the scale and the knobs of each: trained for them alone.
SEPARATE = {
    "full": (1.0, dict(keep_ratio=1.0, top_k=2, vit_blocks=8)),
    "middle": (0.75, dict(keep_ratio=0.5, top_k=2, vit_blocks=8)),
    "small": (0.5, dict(keep_ratio=0.5, top_k=1, vit_blocks=6)),
}
WEIGHTS = "model_final.pth"


class Study(NamedTuple):
    """What is compared, with the weights of one seed."""

    subject: DetectorSubject
    table: LatencyTable
    taught: Outcomes  # that controllers learn from
    held_out: Outcomes  # that they are compared on
    scorer: "Scorer"


class Scorer:
    """COCO's AP of detections of some images of the test set, in percent."""

    def __init__(self, evaluator: COCOEvaluator, items: Sequence[dict]) -> None:
        self.evaluator, self.items = evaluator, items

    def __call__(self, outputs: Sequence[Instances]) -> float:
        self.evaluator.reset()
        self.evaluator.process(self.items, [{"instances": found} for found in outputs])
        with contextlib.redirect_stdout(io.StringIO()):
            found = self.evaluator.evaluate(img_ids=[item["image_id"] for item in self.items])
        return found["bbox"]["AP"]

    def of_choices(self, outcomes: Outcomes, settings: Tensor) -> float:
        """Of outputs that are kept: one setting per item."""
        assert outcomes.outputs is not None
        return self([outcomes.outputs[i, int(s)] for i, s in enumerate(settings)])


# Trainings.


def runs_of(args: argparse.Namespace) -> dict[str, list[Run]]:
    """The trainings by name, one for each seed: the supernet, and what it is compared with."""
    variants: dict[str, list[str]] = {"supernet": []}
    if args.controls:
        variants["random"] = ["model.supernet.sampling=random"]
        variants["plain"] = ["model.supernet=null", "model.multi_scale=[]"]
        for name, (scale, knobs) in SEPARATE.items():
            size = [round(side * scale / 32) * 32 for side in image_size(read(args, []))]
            variants[name] = [
                *(f"model.supernet.{knob}=[{value}]" for knob, value in knobs.items()),
                "model.supernet.sampling=random",
                "model.multi_scale=[]",
                f"dataloader.image_size={size}".replace(" ", ""),
            ]
    return {
        name: [
            Run(
                CONFIG,
                [*args.opts, f"dataloader.train.dataset.root={args.output / 'datasets'}"]
                + [*own, f"train.seed={seed}"],
                args.output / f"{name}_{seed}",
            )
            for seed in args.seeds
        ]
        for name, own in variants.items()
    }


def read(args: argparse.Namespace, overrides: list[str]) -> Any:
    return read_config(CONFIG, [*args.opts, *overrides], args.device)


def study_of(run: Run, args: argparse.Namespace) -> Study:
    """A trained supernet, its latency table, and all of its settings on frames new to it."""
    cfg = read_config(run.config_file, run.overrides, args.device)
    cfg.train.output_dir = str(run.folder / "evaluation")
    model = build_model(cfg).eval()
    load_weights(model, run.folder / WEIGHTS, whole=True)
    size = image_size(cfg)
    subject = DetectorSubject.of(model, size, SCALES)
    file = args.output / "table.json"
    if not file.exists():
        noise = {"image": noise_image(*size, 0), "height": size[0], "width": size[1]}
        measure_table(subject, [noise], args.rounds, min(5, args.rounds)).save(file)
    table = LatencyTable.load(file)
    mapper = build(cfg, "dataloader.test.mapper")
    frames = build(cfg, "dataloader.test.dataset")
    items = [mapper(frame) | {"annotations": frame["annotations"]} for frame in frames]
    parts = items[: args.frames], items[args.frames :]
    files = (run.folder / f"{name}.npz" for name in ("taught", "held_out"))
    taught, held_out = (
        Outcomes(subject, part, table, file, keep=part is parts[1])
        for part, file in zip(parts, files)
    )
    evaluator = COCOEvaluator(
        evaluated_names(cfg)[0], output_dir=cfg.train.output_dir, allow_cached_coco=False
    )
    return Study(subject, table, taught.run_all(), held_out.run_all(), Scorer(evaluator, parts[1]))


# Controllers.


def budgets_of(table: LatencyTable, count: int) -> tuple[list[float], list[float]]:
    """Budgets that controllers are trained for, and those half way between them, which they are
    not; evenly by their logarithms."""
    low, high = table.range()
    both = np.geomspace(1.02 * low, 1.02 * high, 2 * count - 1).tolist()
    return both[::2], both[1::2]


def teach(
    study: Study, seen: list[float], seed: int, folder: Path, args: argparse.Namespace
) -> dict[str, Controller]:
    """The controllers, and the files of their weights and curves."""
    controllers: dict[str, Controller] = {
        "static": BestStatic.fit(study.taught),
        "regression": QualityRegression.fit(study.taught),
    }
    ends = seen[0], seen[-1]
    for name, reward in (("GRPO", "quality"), ("GRPO, notes", "notes")):
        torch.manual_seed(seed)
        policy = TwoStagePolicy.start(study.taught, ends)
        config = GRPOConfig(steps=args.grpo_steps, budgets=tuple(seen), seed=seed)
        grpo = GRPO(policy, study.taught, ends, config, REWARDS[reward]())
        place = folder / reward
        if (place / "grpo.pth").exists():
            grpo.load(place)
        controllers[name] = grpo.train()
        grpo.save(place)
    for name, controller in controllers.items():
        save_controller(folder / f"{name}.pth", controller)
    return controllers


def choices_of(
    study: Study, controllers: dict[str, Controller], budget: float, seed: int
) -> dict[str, Tensor]:
    """The settings (N,) of the held-out items, by who chose them."""
    outcomes = study.held_out
    count = len(outcomes.items)
    items, budgets = torch.arange(count), torch.full((count,), budget)
    chosen = {name: c.decide(outcomes, items, budgets) for name, c in controllers.items()}
    feasible = feasible_settings(outcomes.p95, budgets)
    generator = torch.Generator().manual_seed(seed)
    chosen["random"] = matched_random(chosen["GRPO"], outcomes.p95, generator)
    chosen["oracle"] = oracle(outcomes.quality, outcomes.p50, feasible)
    chosen["full"] = torch.zeros(count, dtype=torch.long)
    return chosen


# Evaluation.


def clock(subject: DetectorSubject, item: dict, setting: dict) -> float:
    """Milliseconds of a run under a setting."""
    start = synchronised_time()
    subject.finish(subject.begin(item, setting), setting)
    return 1e3 * (synchronised_time() - start)


def measure_choices(
    study: Study, controllers: dict[str, Controller], chosen: dict[str, Tensor], budget: float
) -> dict[str, np.ndarray]:
    """Measured milliseconds (N,) of each who chooses; controllers decide while they are timed."""
    outcomes, settings = study.held_out, study.table.settings
    predictors = {
        name: Predictor(study.subject.model, study.table, controllers[name]) for name in controllers
    }
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for index, item in enumerate(outcomes.items):
        for name in chosen:
            if name in predictors:
                times[name].append(predictors[name].predict(item, budget).milliseconds)
            else:
                setting = settings[int(chosen[name][index])]
                times[name].append(clock(study.subject, item, setting))
    return {name: np.array(values) for name, values in times.items()}


def evaluate(study: Study, controllers: dict[str, Controller], budgets, seed: int) -> list[dict]:
    """A row for each budget and each who chooses."""
    rows, outcomes = [], study.held_out
    seen, unseen = budgets
    for budget in tqdm(sorted([*seen, *unseen]), desc="budgets", leave=False, disable=None):
        chosen = choices_of(study, controllers, budget, seed)
        times = measure_choices(study, controllers, chosen, budget)
        items = torch.arange(len(outcomes.items))
        for name, settings in chosen.items():
            expected = outcomes.p50[items, settings]
            rows.append(
                {
                    "seed": seed,
                    "budget": budget,
                    "seen": budget in seen,
                    "who": name,
                    "AP": study.scorer.of_choices(outcomes, settings),
                    "quality": float(outcomes.quality[items, settings].mean()),
                    "expected_ms": float(expected.mean()),
                    "measured_ms": float(times[name].mean()),
                    "p95_ms": float(np.percentile(times[name], 95)),
                    "violations": float((times[name] > budget).mean()),
                    "utilisation": float(times[name].mean() / budget),
                    "settings": int(settings.unique().numel()),
                }
            )
    return rows


def overhead(study: Study, controllers: dict[str, Controller]) -> dict[str, float]:
    """Median share of the full model's latency that decisions for one image take."""
    outcomes, budget = study.held_out, torch.tensor([study.table.range()[1]])
    feasible = feasible_settings(outcomes.p95[:1], budget)
    item, features = outcomes.items[0], outcomes.look(torch.tensor([0]))[0]

    def decide(controller: Controller) -> None:
        tier = controller.choose_tier(study.subject.known(item)[None], budget, feasible)
        controller.choose(features[tier], tier, budget, feasible)

    calls = {name: lambda c=c: decide(c) for name, c in controllers.items()}  # type: ignore[misc]
    full = float(outcomes.p50[0, 0])
    return {name: 1e3 * x.median / full for name, x in measure(calls, 100, 10).items()}


def agreement(study: Study) -> tuple[float, list[float]]:
    """Spearman's correlation of the settings' mean quality with their AP, and the APs."""
    count = len(study.held_out.items)
    aps = [
        study.scorer.of_choices(study.held_out, torch.full((count,), setting))
        for setting in range(len(study.table.settings))
    ]
    return float(spearmanr(study.held_out.quality.mean(0).numpy(), aps).statistic), aps


def compare_trainings(
    runs: dict[str, list[Run]], studies: list[Study], args: argparse.Namespace
) -> list[dict]:
    """AP at the separately trained settings: of those trainings, of the supernets, and of the
    same network that never met random settings."""
    rows = []
    for seed, study in enumerate(studies):
        models = {"supernet": study.subject.model}
        for name in ("random", "plain", *SEPARATE):
            run = runs[name][seed]
            models[name] = build_model(read_config(run.config_file, run.overrides, args.device))
            load_weights(models[name].eval(), run.folder / WEIGHTS, whole=True)
        size = study.subject.image_size
        for name, (scale, knobs) in SEPARATE.items():
            setting = {"scale": scale, **knobs}
            for training in ("supernet", "random", "plain", name):
                subject = DetectorSubject(models[training], size, [setting])  # type: ignore[arg-type]
                items = study.held_out.items
                found = [subject.finish(subject.begin(x, setting), setting) for x in items]
                label = "separate" if training == name else training
                row = {"seed": args.seeds[seed], "setting": name, "training": label}
                rows.append(row | {"AP": study.scorer(found)})  # type: ignore[arg-type]
    return rows


# What is written.


def mean_rows(rows: list[dict], keys: Sequence[str], values: Sequence[str]) -> list[list]:
    """Means over the seeds of the values of rows with equal keys."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        [*key, *(float(np.mean([row[value] for row in group])) for value in values)]
        for key, group in groups.items()
    ]


def tables(results: dict) -> str:
    """The results as text."""
    keys, values = ("budget", "seen", "who"), ("AP", "measured_ms", "violations", "utilisation")
    lines = [
        f"{results['about']['device']}, {results['about']['threads']} threads",
        f"knobs, share of the latency: {results['about']['spans']}",
        f"dropped: {results['dropped']}; repeated measurement: {results['about']['error']}",
        f"rank agreement of quality and AP: {results['agreement']}",
        f"overhead of decisions: {results['overhead']}",
        tabulate(mean_rows(results["rows"], keys, values), (*keys, *values), floatfmt=".3f"),
    ]
    if results["trainings"]:
        keys, values = ("setting", "training"), ("AP",)  # type: ignore[assignment]
        rows = mean_rows(results["trainings"], keys, values)
        lines.append(tabulate(rows, (*keys, *values), floatfmt=".2f"))
    return "\n\n".join(lines)


def draw_tradeoff(results: dict) -> Figure:
    """AP against measured latency, a point for each budget; unseen ones are hollow."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    keys, values = ("who", "budget", "seen"), ("measured_ms", "AP")
    rows = mean_rows(results["rows"], keys, values)
    for who in dict.fromkeys(row[0] for row in rows):
        own = sorted((row for row in rows if row[0] == who), key=lambda row: row[3])
        if who == "full":
            axes.plot(own[0][3], own[0][4], "k*", markersize=12, label=who)
            continue
        (line,) = axes.plot([r[3] for r in own], [r[4] for r in own], label=who)
        for row in own:
            fill = line.get_color() if row[2] else "white"
            axes.plot(row[3], row[4], "o", color=line.get_color(), markerfacecolor=fill)
    axes.set(xlabel="measured latency, mean, ms", ylabel="AP, %")
    axes.legend()
    return figure


def draw_curves(folders: Sequence[Path]) -> Figure:
    """The curves of GRPO, of all seeds."""
    names = ("reward", "quality", "zero_variance", "entropy", "divergence", "utilisation")
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, names):
        for folder in folders:
            for reward in REWARDS:
                history = json.loads((folder / reward / "grpo.json").read_text())
                values = np.array([row[name] for row in history])
                window = max(1, len(values) // 30)
                smooth = np.convolve(values, np.ones(window) / window, "valid")
                axes.plot(smooth, color="C0" if reward == "quality" else "C1", linewidth=0.8)
        axes.set_title(name)
    figure.suptitle("GRPO by step, one line per seed; blue: quality, orange: the notes' reward")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(str(path))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=960, help="frames for the detector")
    parser.add_argument("--frames", type=int, default=300, help="for the controllers")
    parser.add_argument("--held-out", type=int, default=150, help="for the comparison")
    parser.add_argument("--size", type=int, nargs=2, default=[288, 512], metavar=("H", "W"))
    parser.add_argument("--budgets", type=int, default=5, help="that controllers are trained for")
    parser.add_argument("--rounds", type=int, default=30, help="of the latency table")
    parser.add_argument("--grpo-steps", type=int, default=GRPOConfig.steps)
    parser.add_argument("--controls", action="store_true", help="train controls of the supernet")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--device")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides of the config")
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.output = args.output.resolve()
    height, width = args.size
    write_dataset(args.output / "datasets", args.train, args.frames + args.held_out, height, width)
    runs = runs_of(args)
    everything = [run for variant in runs.values() for run in variant]
    for run in everything:
        claim(run)
    train(everything, args.device, args.jobs)

    studies, rows, agreements, overheads = [], [], [], []
    for seed, run in zip(args.seeds, runs["supernet"]):
        study = study_of(run, args)
        studies.append(study)
        budgets = budgets_of(study.table, args.budgets)
        controllers = teach(study, budgets[0], seed, run.folder, args)
        rows += evaluate(study, controllers, budgets, seed)
        agreements.append(agreement(study)[0])
        overheads.append(overhead(study, controllers))
    table = studies[0].table
    results = {
        "about": table.about | {"machine": describe_device(studies[0].subject.device)},
        "dropped": table.dropped,
        "settings": len(table.settings),
        "agreement": agreements,
        "overhead": overheads,
        "rows": rows,
        "trainings": compare_trainings(runs, studies, args) if args.controls else [],
    }
    write_json(args.output / "results.json", results)
    (args.output / "tables.txt").write_text(tables(results) + "\n")
    save_figure(draw_tradeoff(results), args.output / "tradeoff.png")
    folders = [run.folder for run in runs["supernet"]]
    save_figure(draw_curves(folders), args.output / "grpo.png")
    print(tables(results))


if __name__ == "__main__":
    main()
