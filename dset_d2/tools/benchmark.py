"""Latency and throughput of several configs, timed in turn in one process.

    python -m dset_d2.tools.benchmark \\
        --config-file configs/rtdetr/rtdetrv2_r18_coco.py configs/rtdetr/rtdetrv2_r34_coco.py \\
        --batch-size 1 4 --image-size 640 640 480 800 --rounds 50

or of variants of one of them, in the form of dset_d2.tools.ablation:

    python -m dset_d2.tools.benchmark --config-file projects/dset/configs/dset_dinov3_s_coco.py \\
        --variant "dense: model.backbone.pruning=[]" --variant "half of the tokens:"

Every configuration of batch and size times all configs round by round (A B C A B C ...), and sets
each against the first one of its round. Without --image-size each config runs at its own
dataloader.image_size, as it would be deployed. A time spans the model's whole call, from images
that lie on the device to detections; GMACs are of one image. Weights are random and images noise,
which suits dense models and pruning to a share of the tokens; routing may differ on real images
(see dset_d2.tools.analyze).
"""

import itertools
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..analysis import count_flops, measure
from .common import (
    ConfigToolParser,
    build_model,
    check_output,
    describe_device,
    entry_point,
    image_size,
    noise_image,
    read_configs,
    read_variants,
    write_json,
)

WARMUP = 5  # rounds at most
Size = tuple[int, int]  # height, width
COLUMNS = (
    "config", "batch", "height x width", "GMACs", "ms", "quartiles", "images/s", "time / first's"
)  # fmt: skip


def sweep(
    models: dict[str, nn.Module], device: str, sizes: list[dict[str, Size]], args: Namespace
) -> list[dict]:
    """One row per configuration and model; times in seconds.

    Args:
        sizes: each model's (height, width), for one sweep after the other.
    """
    rows = []
    low_precision = args.dtype == "bfloat16"
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=low_precision)
    macs: dict[tuple[str, Size], int] = {}
    grid = list(itertools.product(sizes, args.batch_size))
    for own, batch_size in tqdm(grid, desc="batches and sizes"):
        inputs = {
            (height, width): [
                {"image": noise_image(height, width, seed).to(device)} for seed in range(batch_size)
            ]
            for height, width in set(own.values())
        }
        calls = {name: partial(model, inputs[own[name]]) for name, model in models.items()}
        with torch.no_grad(), autocast:
            latencies = measure(calls, args.rounds, min(WARMUP, args.rounds))
        for name, latency in latencies.items():
            size = own[name]
            if (name, size) not in macs:
                macs[name, size] = count_flops(models[name], inputs[size][:1]).total
            rows.append(
                {
                    "config": name,
                    "batch_size": batch_size,
                    "image_size": list(size),
                    "macs": macs[name, size],
                    "images_per_second": batch_size / latency.median,
                    **asdict(latency),
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        low, high = (1e3 * value for value in row["quartiles"])
        ratio_low, ratio_high = row["ratio_quartiles"]
        lines.append(
            (
                row["config"],
                row["batch_size"],
                "{} x {}".format(*row["image_size"]),
                f"{row['macs'] / 1e9:.2f}",
                f"{1e3 * row['median']:.2f}",
                f"{low:.2f} - {high:.2f}",
                f"{row['images_per_second']:.1f}",
                f"{row['ratio']:.3f} ({ratio_low:.3f} - {ratio_high:.3f})",
            )
        )
    return tabulate(lines, COLUMNS, disable_numparse=True)


def about(sizes: list[dict[str, Size]], given: bool) -> str:
    """Which sizes these are, and what that means for the comparison."""
    if given:
        return "all configs at the sizes of --image-size"
    if len(set(sizes[0].values())) == 1:
        return "size: the configs' dataloader.image_size"
    return (
        "each config at its own dataloader.image_size, which differ: times compare detectors as "
        "configured, not networks at one size (--image-size)"
    )


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ConfigToolParser(__doc__, several=True)
    parser.add_variants(required=False)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[], metavar="H W",
        help="pairs; default: each config's dataloader.image_size",
    )  # fmt: skip
    parser.add_device()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 by autocast"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    if len(args.image_size) % 2:
        parser.error("--image-size takes pairs of height and width")
    if min(*args.batch_size, *args.image_size, args.rounds) < 1:
        parser.error("--batch-size, --image-size and --rounds must be positive")
    if args.variant and len(args.config_file) > 1:
        parser.error("--variant takes one --config-file")

    if args.output:
        check_output(args.output, args.config_file)
    if args.variant:
        configs = read_variants(args.variant, args.config_file[0], args.opts, args.device)
    else:
        configs = read_configs(args.config_file, args.opts, args.device)
    device = next(iter(configs.values())).train.device
    models = {name: build_model(cfg).eval() for name, cfg in configs.items()}
    if args.channels_last:
        models = {name: m.to(memory_format=torch.channels_last) for name, m in models.items()}
    given = list(zip(args.image_size[::2], args.image_size[1::2]))
    sizes = [dict.fromkeys(configs, size) for size in given]
    if not given:
        sizes = [{name: image_size(cfg) for name, cfg in configs.items()}]
    rows = sweep(models, device, sizes, args)
    layout = "channels last" if args.channels_last else "channels first"
    print(f"{describe_device(device)}, {args.dtype}, {layout}, {args.rounds} rounds; ", end="")
    print(f"random weights, noise images; {about(sizes, bool(given))}")
    print(table(rows))
    if args.output:
        settings = {
            "device": describe_device(device),
            "torch": torch.__version__,
            "dtype": args.dtype,
            "channels_last": args.channels_last,
            "rounds": args.rounds,
        }
        write_json(args.output, settings | {"results": rows})


if __name__ == "__main__":
    main()
