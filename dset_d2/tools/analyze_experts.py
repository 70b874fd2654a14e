"""What the experts of a model do over its config's test set.

    python -m dset_d2.tools.analyze_experts --config-file CONFIG --weights model_best.pth \\
        --output output/experts --num-images 500

writes to the folder, of each layer of experts, load.png (share of the assignments),
coactivation_LAYER.png (share of the tokens that two experts share), classes_LAYER.png and
sizes_LAYER.png (how the tokens of objects of a class, or of a size in COCO's sense, and of the
background are given to the experts), and experts.json with the numbers and the entropies of routers
and loads in nats. dset_d2/analysis/experts.py says to which object a token or a query belongs.
Padding counts for nothing, and neither does what lies in regions whose objects are not annotated.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from ..analysis import ExpertAnalysis, objects_of
from ..visualization import plot_heat_map, rendered
from .common import (
    ConfigToolParser,
    UsageError,
    build,
    build_model,
    class_names,
    describe_device,
    entry_point,
    load_weights,
    own_weights,
    read_config,
    usage_errors,
    write_json,
)
from .preparation import build_loader, some
from .visualize import check_folder, save


def table(layers: dict[str, dict]) -> str:
    """A line for each layer; entropies relative to the largest possible."""
    rows = []
    for place, layer in layers.items():
        largest = layer["largest_entropy"] or 1.0
        load = layer["load"]
        rows.append(
            (
                place,
                f"{layer['tokens']} {layer['stand']}",
                f"{layer['top_k']} of {layer['num_experts']}",
                f"{min(load):.1%}",
                f"{max(load):.1%}",
                f"{layer['load_entropy'] / largest:.3f}",
                f"{layer['router_entropy'] / largest:.3f}",
            )
        )
    columns = ("layer", "tokens", "experts", "least load", "most", "entropy of load", "of router")
    align = ["left"] * 3 + ["right"] * 4
    return tabulate(rows, columns, colalign=align, disable_numparse=True)


def figures(layers: dict[str, dict]) -> Iterator[tuple[str, Figure]]:
    """Heat maps by the names of their files."""
    widest = max(layer["num_experts"] for layer in layers.values())
    loads = np.full((len(layers), widest), np.nan)
    for row, layer in zip(loads, layers.values()):
        row[: layer["num_experts"]] = layer["load"]
    experts = [str(i) for i in range(widest)]
    share = "share of assignments"
    yield "load", plot_heat_map(loads, list(layers), experts, "load", "expert", "layer", share)
    for place, layer in layers.items():
        own = experts[: layer["num_experts"]]
        yield (
            f"coactivation_{place}",
            plot_heat_map(
                np.array(layer["coactivation"]),
                *(own, own, f"{place}: co-activation", "expert", "expert"),
                "share of tokens that use both",
            ),
        )
        for key, name in (("by_class", "classes"), ("by_size", "sizes")):
            if layer[key] is None:
                continue
            groups = [*layer[key].items(), ("background", layer["background"])]
            blank = [np.nan] * layer["num_experts"]
            values = np.array([x["load"] or blank for _, x in groups])
            rows = [f"{group} ({x['tokens']})" for group, x in groups]
            title = f"{place}: {name}"
            yield (
                f"{name}_{place}",
                plot_heat_map(
                    values, rows, own, title, "expert", f"what {layer['stand']} see", share
                ),
            )


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ConfigToolParser(__doc__)
    parser.add_argument("--weights", help="of a run, or released; needless if the config has some")
    parser.add_argument("--output", type=Path, required=True, help="folder for JSON and PNG files")
    parser.add_argument("--num-images", type=int, help="spread over the test set; default: all")
    parser.add_device()
    args = parser.parse_args(argv)
    if args.num_images is not None and args.num_images < 1:
        parser.error("--num-images must be positive")

    cfg = read_config(args.config_file, args.opts, args.device)
    if not (args.weights or own_weights(cfg)):
        parser.error("the following arguments are required: --weights")
    model = build_model(cfg).eval()
    if args.weights:
        load_weights(model, args.weights, whole=True)
    dataset = cast(list, some(build(cfg, "dataloader.test.dataset"), args.num_images))
    check_folder(args.output, [Path(x["file_name"]) for x in dataset])
    loader = build_loader(cfg, "test", dataset)
    classes = class_names(cfg)
    analysis = ExpertAnalysis(classes)
    dataset_dicts = iter(dataset)
    with tqdm(total=len(dataset), desc="analysing", unit="image") as progress:
        for inputs in loader:
            objects = []
            for x, dataset_dict in zip(inputs, dataset_dicts):
                with usage_errors(x["file_name"]):
                    objects.append(objects_of(dataset_dict, x["height"], x["width"], len(classes)))
            analysis.run(model, inputs, objects)
            if not analysis.layers:
                raise UsageError("the model has no experts, or none that route yet")
            progress.update(len(inputs))
    layers = analysis.report()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(layers):
        save(rendered(figure), args.output / f"{name}.png")
    about = {
        "config": args.config_file,
        "opts": args.opts,
        "weights": args.weights or own_weights(cfg),
        "images": len(dataset),
        "device": describe_device(cfg.train.device),
        "torch": torch.__version__,
    }
    write_json(args.output / "experts.json", about | {"layers": layers})
    print(f"{table(layers)}\n\n{len(dataset)} images; drawn to {args.output}")


if __name__ == "__main__":
    main()
