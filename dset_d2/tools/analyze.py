"""What a config's model costs, part by part, beside the configs that it is compared with.

    python -m dset_d2.tools.analyze --config-file projects/dset/configs/dset_r18_dair_v2x.py \\
        --compare configs/rtdetr/rtdetrv2_r18_coco.py --num-inputs 16 --latency-rounds 30

Multiply-adds (GMACs) are traced on real images, because sparse parts may cost more on one image
than on another: those of the first config's test set, or those that --images names. Without
either, noise stands in, and the output says so. dset_d2/analysis/flops.py says what is counted.
Active parameters are those that work on one token. Activations are the elements that convolutions
and matrix products put out. Latencies are of the model's whole call on the first image, all
configs in turn in one process; those of its parts come from calls of their own. What was not
measured is blank.
"""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from detectron2.config import instantiate
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
from ..checkpoint import load_upstream
from .common import (
    UsageError,
    build_model,
    describe_device,
    load_configs,
    noise_image,
    write_json,
)

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
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


def find_records(files: list[Path], cfg: DictConfig, count: int) -> tuple[list[dict] | None, str]:
    """Dataset dicts of images, spread evenly over their source, and what they are.

    Returns None for the dicts if there are no real images.
    """
    if files:
        records = [{"file_name": str(file)} for file in expand_folders(files)]
        source = f"real images, from {', '.join(map(str, files))}"
    else:
        try:
            records = instantiate(cfg.dataloader.test.dataset)
        except (OSError, KeyError, ValueError) as error:
            return None, f"NOT REAL: noise, as the config's test set cannot be read: {error}"
        source = "real images, from the first config's test set"
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)], f"{count} {source}"


def expand_folders(files: list[Path]) -> list[Path]:
    """Files as they are, and the images of folders in order of their names."""
    images = []
    for file in files:
        if file.is_dir():
            found = sorted(f for f in file.iterdir() if f.suffix.lower() in SUFFIXES)
            if not found:
                raise UsageError(f"{file}: holds no image")
            images += found
        elif file.is_file():
            images.append(file)
        else:
            raise UsageError(f"{file}: no such file or folder")
    return images


def make_inputs(cfg: DictConfig, records: list[dict] | None, count: int) -> list[dict]:
    """The detector's inputs by the config's own mapper, or noise of the config's size."""
    if records is None:
        size = cfg.dataloader.image_size
        return [{"image": noise_image(*size, seed)} for seed in range(count)]
    mapper = instantiate(cfg.dataloader.test.mapper)
    return [mapper(record) for record in tqdm(records, desc="reading images", leave=False)]


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


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--compare", nargs="+", default=[], metavar="CONFIG")
    parser.add_argument("--num-inputs", type=int, default=8, help="images that are traced")
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("H", "W"), help="dataloader.image_size"
    )
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="files or folders")
    parser.add_argument(
        "--checkpoint", nargs="+", default=[], help="one for each config; else random weights"
    )
    parser.add_argument("--depth", type=int, default=2, help="levels of modules that are listed")
    parser.add_argument("--latency-rounds", type=int, default=0, help="0 measures no latency")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--opts", nargs="*", default=[], help="overrides of every config")
    args = parser.parse_args(argv)
    if args.num_inputs < 1:
        parser.error("--num-inputs must be positive")
    if len(args.checkpoint) not in (0, 1 + len(args.compare)):
        parser.error("--checkpoint takes one file for each config")
    if args.image_size:
        args.opts.append(f"dataloader.image_size={args.image_size}")
    return parser, args


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    paths = [args.config_file, *args.compare]
    try:
        configs = load_configs(paths, args.opts)
        cfg = next(iter(configs.values()))
        records, source = find_records(args.images, cfg, args.num_inputs)
    except UsageError as error:
        parser.error(str(error))
    device = cfg.train.device
    models, inputs, results = {}, {}, {}
    checkpoints = args.checkpoint or [None] * len(paths)
    for (name, cfg), path, checkpoint in zip(configs.items(), paths, checkpoints):
        models[name] = build_model(cfg, device)
        if checkpoint:
            try:
                load_upstream(models[name], checkpoint)
            except (OSError, ValueError) as error:
                parser.error(str(error))
        inputs[name] = make_inputs(cfg, records, args.num_inputs)
        about = {"config": path, "checkpoint": checkpoint}
        results[name] = about | analyze(models[name], inputs[name], args.depth)
    if args.latency_rounds:
        add_latencies(results, models, inputs, args.latency_rounds)

    first = next(iter(results.values()))
    for name, result in results.items():
        whole = [other["modules"][""]["macs"]["mean"] for other in (result, first)]
        result["ratio"] = whole[0] / whole[1]
        print(f"\n{name}: {result['config']}")
        print(f"weights: {result['checkpoint'] or 'random, which routing and pruning depend on'}")
        print(f"\n{module_table(result, first)}\n\n{operator_table(result)}")
    print(f"\nimages: {source}\ndevice: {describe_device(device)}\n\n{summary_table(results)}")
    if args.json:
        about = {"images": source, "real_images": records is not None}
        about |= {"device": describe_device(device), "torch": torch.__version__}
        write_json(args.json, about | {"opts": args.opts, "results": results})


if __name__ == "__main__":
    main()
