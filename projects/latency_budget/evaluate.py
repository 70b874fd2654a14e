"""One detector under latency budgets: trains it, measures it, trains who chooses its settings, and
compares them.

    OMP_NUM_THREADS=1 python projects/latency_budget/evaluate.py --output output/latency_budget

Draws scenes of mixed difficulty, trains a small supernet per seed, measures the latency table, runs
all settings on frames that the detector was not trained on, fits and trains controllers on some of
these, and evaluates on the others: AP against measured latency under seen and unseen budgets. What
is done is kept in the folder and not done again; --controls 0 1 also trains what the supernets of
these seeds are to be compared with. Writes results.json, tables.txt, tradeoff.png and grpo.png.

Latencies are of one device: nothing else should run on it meanwhile.
"""

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances
from scipy.stats import spearmanr
from tabulate import tabulate
from torch import Tensor

from dset_d2.budget import DetectorSubject, GRPOConfig, LatencyTable, Outcomes, measure_table
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
from dset_d2.budget.detector import scaled_size
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

CONFIG = str(Path(__file__).parent.resolve() / "configs" / "vit_moe_roadside.py")
SCALES = (1.0, 0.75, 0.5)
# What the supernet is compared with, at the scale and the knobs of each: trained for them alone.
SEPARATE = {
    "full": (1.0, dict(keep_ratio=1.0, top_k=2, vit_blocks=8)),
    "middle": (0.75, dict(keep_ratio=0.5, top_k=2, vit_blocks=8)),
    "small": (0.5, dict(keep_ratio=0.5, top_k=1, vit_blocks=6)),
}
DIVISOR = 32  # of sides of images, for the config's model
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
        # At the cost of the supernet.
        variants["sandwich"] = ["model.supernet.sampling=sandwich", "train.epochs=5"]
        full_size = image_size(read_config(CONFIG, args.opts, args.device))
        for name, (scale, knobs) in SEPARATE.items():
            size = list(scaled_size(full_size, scale, DIVISOR))
            variants[name] = [
                *(f"model.supernet.{knob}=[{value}]" for knob, value in knobs.items()),
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
            for seed in (args.seeds if name == "supernet" else args.controls)
        ]
        for name, own in variants.items()
    }


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


def agreement(study: Study) -> float:
    """Spearman's correlation of the settings' mean quality with their AP."""
    count = len(study.held_out.items)
    aps = [
        study.scorer.of_choices(study.held_out, torch.full((count,), setting))
        for setting in range(len(study.table.settings))
    ]
    return float(spearmanr(study.held_out.quality.mean(0).numpy(), aps).statistic)


def compare_trainings(
    runs: dict[str, list[Run]], studies: dict[int, Study], args: argparse.Namespace
) -> list[dict]:
    """AP at the separately trained settings: of those trainings, of the supernets, and of the
    network that has only met the full setting."""
    rows = []
    for index, seed in enumerate(args.controls):
        study = studies[seed]
        models = {"supernet": study.subject.model}
        for name in ("sandwich", *SEPARATE):
            run = runs[name][index]
            models[name] = build_model(read_config(run.config_file, run.overrides, args.device))
            load_weights(models[name].eval(), run.folder / WEIGHTS, whole=True)
        for name, (scale, knobs) in SEPARATE.items():
            setting = {"scale": scale, **knobs}
            for training in dict.fromkeys(("supernet", "sandwich", "full", name)):
                subject = DetectorSubject(models[training], study.subject.image_size, [setting])
                items = study.held_out.items
                found = [subject.finish(subject.begin(x, setting), setting) for x in items]
                label = "separate" if training == name else training
                row = {"seed": seed, "setting": name, "training": label}
                rows.append(row | {"AP": study.scorer(found)})
    return rows


# What is written.


def tables(results: dict) -> str:
    """The results as text."""
    about = results["about"]
    keys, values = ("budget", "seen", "who"), ("score", "measured_ms", "violations", "utilisation")
    lines = [
        f"{about['machine']}; quality and AP agree in rank: {results['agreement']}",
        f"knobs, share of the latency: {about['spans']}",
        f"dropped: {results['dropped']}; repeated measurement: {about['error']}",
        f"overhead of decisions, share of the full latency: {results['overhead']}",
        tabulate(means(results["rows"], keys, values), headers="keys", floatfmt=".3f"),
        tabulate(results["conclusions"], headers="keys", floatfmt=".3f"),
    ]
    if results["trainings"]:
        rows = means(results["trainings"], ("setting", "training"), ("AP",))
        lines.append(tabulate(rows, headers="keys", floatfmt=".2f"))
    return "\n\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=480, help="frames for the detector")
    parser.add_argument("--frames", type=int, default=300, help="for the controllers")
    parser.add_argument("--held-out", type=int, default=150, help="for the comparison")
    parser.add_argument("--size", type=int, nargs=2, default=[288, 512], metavar=("H", "W"))
    parser.add_argument("--budgets", type=int, default=5, help="that controllers are trained for")
    parser.add_argument("--rounds", type=int, default=30, help="of the latency table")
    parser.add_argument("--grpo-steps", type=int, default=GRPOConfig.steps)
    parser.add_argument("--timed", type=int, default=60, help="of these that are timed")
    parser.add_argument(
        "--controls", type=int, nargs="*", default=[], help="seeds of the supernet's controls"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--device")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides of the config")
    args = parser.parse_args(argv)
    if not set(args.controls) <= set(args.seeds):
        parser.error(f"--controls {args.controls}: must be among --seeds {args.seeds}")
    return args


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

    studies = [study_of(run, args) for run in runs["supernet"]]
    rows, agreements, overheads = [], [], []
    for seed, run, study in zip(args.seeds, runs["supernet"], studies):
        budgets = spaced_budgets(study.table, args.budgets)
        config = GRPOConfig(steps=args.grpo_steps, seed=seed)
        controllers = teach(study.taught, budgets[0], run.folder, config)
        scorer = study.scorer.of_choices
        rows += compare(study.held_out, controllers, budgets, seed, scorer, args.timed)
        agreements.append(agreement(study))
        overheads.append(overhead(study.held_out, controllers))
    table = studies[0].table
    results = {
        "about": table.about | {"machine": describe_device(studies[0].subject.device)},
        "dropped": table.dropped,
        "settings": len(table.settings),
        "agreement": agreements,
        "overhead": overheads,
        "rows": rows,
        "conclusions": conclusions(rows),
        "trainings": compare_trainings(runs, dict(zip(args.seeds, studies)), args),
    }
    write_json(args.output / "results.json", results)
    (args.output / "tables.txt").write_text(tables(results) + "\n")
    draw_tradeoff(rows, "AP").savefig(args.output / "tradeoff.png")
    folders = [run.folder for run in runs["supernet"]]
    draw_curves(folders).savefig(args.output / "grpo.png")
    print(tables(results))


if __name__ == "__main__":
    main()
