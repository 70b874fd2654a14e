"""Measure how long a detector takes under each of its settings on this device.

    python -m dset_d2.tools.latency_table \\
        --config-file projects/latency_budget/configs/vit_moe_roadside.py --output table.json

The settings are all combinations of --scales of dataloader.image_size with the values of knobs in
the config's model.supernet, and with numbers of decoder layers, which any training serves. All of
them take turns (A B C A B C ...), --rounds times and as often again; the table has the p50 and p95
of all, and how far the second half is from the first. Knobs that change less than 3 % of the
latency are dropped.

Weights are random unless --weights names some, and images noise: times do not depend on either.
The table is of one device, model and number of threads, and refused elsewhere.
"""

from pathlib import Path

import torch
from tabulate import tabulate

from ..budget import DetectorSubject, LatencyTable, measure_table
from .common import (
    ConfigToolParser,
    build_model,
    check_output,
    describe_device,
    entry_point,
    image_size,
    load_weights,
    noise_image,
    read_config,
    usage_errors,
)

WARMUP = 5  # rounds at most


def summary(table: LatencyTable) -> str:
    """Times by setting and shape, in milliseconds."""
    knobs = [knob for knob in table.settings[0] if knob != table.tier]
    rows = [
        (shape, *(dict(rest)[knob] for knob in knobs), f"{times.p50:.2f}", f"{times.p95:.2f}")
        for (shape, rest), times in table.times.items()
    ]
    return tabulate(rows, ("input", *knobs, "p50, ms", "p95, ms"), disable_numparse=True)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ConfigToolParser(__doc__)
    parser.add_argument("--weights", help="of a run, or released; default: random")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.75, 0.5])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_device()
    args = parser.parse_args(argv)
    if min(*args.batch_size, args.rounds) < 1:
        parser.error("--batch-size and --rounds must be positive")
    check_output(args.output, [args.config_file, *([args.weights] if args.weights else [])])
    cfg = read_config(args.config_file, args.opts, args.device)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if args.weights:
        load_weights(model, args.weights, whole=True)
    size = image_size(cfg)
    with usage_errors("--scales"):
        subject = DetectorSubject.of(model, size, args.scales)
    items = [
        [{"image": noise_image(*size, seed)} for seed in range(batch)] for batch in args.batch_size
    ]
    table = measure_table(subject, items, args.rounds, min(WARMUP, args.rounds))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    table.save(args.output)
    print(f"{describe_device(str(model.device))}, {args.rounds} rounds\n{summary(table)}")
    spans = ", ".join(f"{knob} {share:.1%}" for knob, share in table.about["spans"].items())
    print(f"of the latency, median: {spans or 'no knob changes any'}")
    if table.dropped:
        gone = ", ".join(f"{knob} {share:.1%}" for knob, share in table.dropped.items())
        print(f"dropped, as they change too little: {gone}")
    error = table.about["error"]
    print(f"repeated measurement: {error['median']:.1%} off, at most {error['largest']:.1%}")
    print(f"{len(table.settings)} settings in {args.output}")


if __name__ == "__main__":
    main()
