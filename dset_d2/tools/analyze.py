"""What the models of configs cost, part by part, beside the first one's.

    python -m dset_d2.tools.analyze --num-images 16 --latency-rounds 30 --config-file \\
        configs/rtdetr/rtdetrv2_r18_coco.py projects/dset/configs/dset_r18_dair_v2x.py

Multiply-adds (GMACs) are traced on real images, because sparse parts may cost more on one image
than on another: those of the first config's test set, or those that --input names. Without
either, noise stands in, and the output says so. dset_d2/analysis/flops.py says what is counted.
Active parameters are those that work on one token. Activations are the elements that convolutions
and matrix products put out. Latencies are of the model's whole call on the first image, all
configs in turn in one process; those of its parts come from calls of their own. What was not
measured is blank.
"""

from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..analysis import (
    FlopReport,
    count_activations,
    count_flops,
    count_parameters,
    measure,
    measure_modules,
)
from .common import (
    ConfigToolParser,
    UsageError,
    build,
    build_model,
    check_output,
    describe_device,
    entry_point,
    image_files,
    image_size,
    load_weights,
    noise_image,
    own_weights,
    read_configs,
    read_images,
    write_json,
)

WARMUP = 3
MODULE_COLUMNS = (
    "module",
    "GMACs",
    "least - most",
    "share",
    "GMACs / first's",
    "params M",
    "active M",
    "activations M",
    "ms",
)
SUMMARY_COLUMNS = (
    "config",
    "GMACs",
    "GFLOPs (2 x MACs)",
    "GMACs / first's",
    "params M",
    "active M",
    "activations M",
    "ms (quartiles)",
    "time / first's (quartiles)",
)


def find_images(files: list[Path], cfg: DictConfig, count: int) -> tuple[list[dict] | None, str]:
    """Dataset dicts of images, spread evenly over their source, and what they are.

    Returns None for the dicts if there are no real images; damaged ones are left out.
    """
    if files:
        dataset_dicts = image_files(files)
        source = f"real images, from {', '.join(map(str, files))}"
    else:
        try:
            dataset_dicts = build(cfg, "dataloader.test.dataset")
        except UsageError as error:
            return None, f"NOT REAL: noise, for want of images: {error}"
        source = "real images, from the first config's test set"
    total = len(dataset_dicts)
    count = min(count, total)
    chosen = [dataset_dicts[i * total // count] for i in range(count)]
    usable = [dataset_dict for dataset_dict, _ in read_images(chosen)]
    return usable, f"{len(usable)} {source}"


def make_inputs(cfg: DictConfig, dataset_dicts: list[dict] | None, count: int) -> list[dict]:
    """The detector's inputs by the config's own mapper, or noise of the config's size."""
    if dataset_dicts is None:
        return [{"image": noise_image(*image_size(cfg), seed)} for seed in range(count)]
    mapper = build(cfg, "dataloader.test.mapper")
    return [mapper(x) for x in tqdm(dataset_dicts, desc="reading images", leave=False)]


def spread(values: list[int]) -> dict:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def analyze(model: nn.Module, inputs: list[dict], depth: int) -> dict:
    """Multiply-adds over the inputs, activations and parameters; "" among modules is the whole."""
    flops: list[FlopReport] = []
    activations = []
    for x in tqdm(inputs, desc="tracing", leave=False):
        flops.append(count_flops(model, [x]))
        activations.append(count_activations(model, [x]))
    parameters = count_parameters(model, inputs[:1])
    modules = {}
    for name in flops[0].by_module:
        macs = spread([report.by_module[name] for report in flops])
        deep = name.count(".") >= depth
        if name and (deep or not (macs["max"] or parameters[name].total)):
            continue
        modules[name] = {
            "macs": macs,
            "activations": spread([counts[name] for counts in activations]),
            "parameters": asdict(parameters[name]),
            "latency": None,
        }
    names = {name for report in flops for name in report.by_operator}
    operators = {
        name: spread([report.by_operator.get(name, 0) for report in flops]) for name in names
    }
    by_cost = sorted(operators.items(), key=lambda item: -item[1]["mean"])
    return {"modules": modules, "operators": dict(by_cost)}


@torch.no_grad()
def add_latencies(
    results: dict[str, dict], models: dict[str, nn.Module], inputs: dict[str, list[dict]], rounds
) -> None:
    """Time the first image: whole models in turn, then each model's parts on their own."""
    calls = {name: partial(model, inputs[name][:1]) for name, model in models.items()}
    for name, latency in measure(calls, rounds, WARMUP).items():
        modules = results[name]["modules"]
        parts = {part: models[name].get_submodule(part) for part in modules if part}
        for part, seconds in measure_modules(calls[name], parts, rounds).items():
            modules[part]["latency"] = {"median": seconds}
        modules[""]["latency"] = asdict(latency)


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"


def interval(values: dict, digits: int, scale: float) -> str:
    """From the least to the most, blank where they are the same."""
    if values["min"] == values["max"]:
        return ""
    return f"{values['min'] * scale:.{digits}f} - {values['max'] * scale:.{digits}f}"


def ratio(result: dict, first: dict, name: str) -> float | None:
    """Multiply-adds over those of the first config's module of the same name, if it has any."""
    other = first["modules"].get(name)
    if result is first or not other or not other["macs"]["mean"]:
        return None
    return result["modules"][name]["macs"]["mean"] / other["macs"]["mean"]


def module_table(result: dict, first: dict) -> str:
    whole = result["modules"][""]["macs"]["mean"]
    rows = []
    for name, module in result["modules"].items():
        macs, latency = module["macs"], module["latency"]
        rows.append(
            (
                "  " * (name.count(".") + 1) + name if name else "all",
                number(macs["mean"], 3, 1e-9),
                interval(macs, 3, 1e-9),
                f"{macs['mean'] / whole:.1%}",
                number(ratio(result, first, name), 3),
                number(module["parameters"]["total"], 3, 1e-6),
                number(module["parameters"]["active"], 3, 1e-6),
                number(module["activations"]["mean"], 2, 1e-6),
                number(latency["median"], 2, 1e3) if latency else "",
            )
        )
    return text_table(rows, MODULE_COLUMNS)


def operator_table(result: dict) -> str:
    whole = result["modules"][""]["macs"]["mean"]
    rows = [
        (
            name,
            number(macs["mean"], 4, 1e-9),
            interval(macs, 4, 1e-9),
            f"{macs['mean'] / whole:.2%}",
        )
        for name, macs in result["operators"].items()
    ]
    return text_table(rows, ("operator", *MODULE_COLUMNS[1:4]))


def summary_table(results: dict[str, dict]) -> str:
    rows = []
    for name, result in results.items():
        whole = result["modules"][""]
        macs, latency = whole["macs"]["mean"], whole["latency"]
        time = against = ""
        if latency:
            low, high = (1e3 * x for x in latency["quartiles"])
            time = f"{1e3 * latency['median']:.1f} ({low:.1f} - {high:.1f})"
            low, high = latency["ratio_quartiles"]
            against = f"{latency['ratio']:.3f} ({low:.3f} - {high:.3f})"
        rows.append(
            (
                name,
                number(macs, 3, 1e-9),
                number(macs, 3, 2e-9),
                number(result["ratio"], 3),
                number(whole["parameters"]["total"], 3, 1e-6),
                number(whole["parameters"]["active"], 3, 1e-6),
                number(whole["activations"]["mean"], 2, 1e-6),
                time,
                against,
            )
        )
    return text_table(rows, SUMMARY_COLUMNS)


def text_table(rows: list[tuple], columns: tuple[str, ...]) -> str:
    align = ["left"] + ["right"] * (len(columns) - 1)
    return tabulate(rows, columns, colalign=align, disable_numparse=True, preserve_whitespace=True)


def parse(argv: list[str] | None) -> Namespace:
    parser = ConfigToolParser(__doc__, several=True)
    parser.add_argument("--weights", nargs="+", help="one for each config; else random weights")
    parser.add_argument("--input", nargs="+", type=Path, default=[], metavar="FILE_OR_FOLDER")
    parser.add_argument("--num-images", type=int, default=8, help="images that are traced")
    parser.add_argument("--depth", type=int, default=2, help="levels of modules that are listed")
    parser.add_argument("--latency-rounds", type=int, default=0, help="0 measures no latency")
    parser.add_device()
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    if args.num_images < 1:
        parser.error("--num-images must be positive")
    if args.weights and len(args.weights) != len(args.config_file):
        parser.error("--weights takes one file for each config")
    return args


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    paths = args.config_file
    if args.output:
        images = [x["file_name"] for x in image_files(args.input)]
        check_output(args.output, [*paths, *(args.weights or []), *images])
    configs = read_configs(paths, args.opts, args.device)
    cfg = next(iter(configs.values()))
    dataset_dicts, source = find_images(args.input, cfg, args.num_images)
    device = cfg.train.device
    models, inputs, results = {}, {}, {}
    all_weights = args.weights or [None] * len(paths)
    for (name, cfg), path, weights in zip(configs.items(), paths, all_weights):
        models[name] = build_model(cfg).eval()
        if weights:
            load_weights(models[name], weights)
        weights = weights or own_weights(cfg) or None
        inputs[name] = make_inputs(cfg, dataset_dicts, args.num_images)
        about = {"config": path, "weights": weights}
        results[name] = about | analyze(models[name], inputs[name], args.depth)
    if args.latency_rounds:
        add_latencies(results, models, inputs, args.latency_rounds)

    first = next(iter(results.values()))
    for name, result in results.items():
        whole = [other["modules"][""]["macs"]["mean"] for other in (result, first)]
        result["ratio"] = whole[0] / whole[1]
        print(f"\n{name}: {result['config']}")
        print(f"weights: {result['weights'] or 'random, which routing and pruning depend on'}")
        print(f"\n{module_table(result, first)}\n\n{operator_table(result)}")
    print(f"\nimages: {source}\ndevice: {describe_device(device)}\n\n{summary_table(results)}")
    if args.output:
        about = {"images": source, "real_images": dataset_dicts is not None}
        about |= {"device": describe_device(device), "torch": torch.__version__}
        write_json(args.output, about | {"opts": args.opts, "results": results})


if __name__ == "__main__":
    main()
