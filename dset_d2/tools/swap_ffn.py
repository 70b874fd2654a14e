"""Put experts in the place of a trained model's FFNs, and say what that changes.

    python -m dset_d2.tools.swap_ffn --config-file CONFIG --weights dense.pth \\
        --output swapped.pth model.swap.moe.num_experts=8 model.swap.method=paper

The settings are those of ``model.swap``; with the same ones, a model is trained or evaluated from
the output by ``train.init_checkpoint=swapped.pth``. Which hidden units are active together
(``model.swap.method=coactivation``) is seen on images, of the training set or of --input. On the
same images the model is tried before and after. --report prints what a split by co-activation is
worth: of each FFN the share of the hidden units that fire, and the relative error of its output
with some of the groups, beside those of a random split and of one in order.
"""

from pathlib import Path

import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf
from tabulate import tabulate
from torch import Tensor, nn

from ..files import write_atomically
from ..modeling.sparse import report_coactivation, swap_ffn_for_moe
from ..modeling.sparse.coactivation import SplitReport
from .common import (
    ConfigToolParser,
    UsageError,
    build,
    build_model,
    check_output,
    entry_point,
    image_files,
    load_weights,
    read_config,
    read_images,
    usage_errors,
)


@torch.no_grad()
def predictions(model: nn.Module, inputs: list[dict]) -> tuple[Tensor, Tensor]:
    """Scores and boxes of all queries for all images, one after the other."""
    scores, boxes = [], []
    for x in inputs:
        outputs = model.predict(*model.preprocess([x]))
        scores.append(outputs["pred_logits"].sigmoid().flatten())
        boxes.append(outputs["pred_boxes"].flatten())
    return torch.cat(scores), torch.cat(boxes)


def table(reports: dict[str, SplitReport], num_groups: int) -> str:
    """Errors with an eighth, a quarter, half and all of the groups, at least one."""
    counts = sorted({max(1, num_groups // share) for share in (8, 4, 2, 1)})
    rows = []
    for name, report in reports.items():
        for split, errors in report.errors.items():
            about = (name, f"{report.firing:.0%}", f"{report.firing_per_token:.0%}")
            about = about if split == "coactivation" else ("", "", "")
            rows.append((*about, split, *(f"{errors[count - 1]:.4f}" for count in counts)))
    columns = ("FFN", "fire", "per token", "split", *(f"{n} of {num_groups}" for n in counts))
    return tabulate(rows, columns, disable_numparse=True)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ConfigToolParser(__doc__)
    parser.add_argument("--weights", help="dense ones; needless if the config's model has some")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint")
    parser.add_argument("--input", nargs="+", type=Path, default=[], metavar="FILE_OR_FOLDER")
    parser.add_argument("--num-images", type=int, default=32, help="spread over their source")
    parser.add_argument("--report", action="store_true", help="compare splits of the FFNs")
    parser.add_device()
    args = parser.parse_args(argv)
    if args.num_images < 1:
        parser.error("--num-images must be positive")
    read = [args.weights] if args.weights else []
    images = [x["file_name"] for x in image_files(args.input)]
    check_output(args.output, [args.config_file, *read, *args.input, *images])

    cfg = read_config(args.config_file, args.opts, args.device)
    swap = OmegaConf.select(cfg, "model.swap")
    for key in ("swap", "trainable"):  # the dense model, which has no experts to be named
        if OmegaConf.select(cfg, f"model.{key}") is not None:
            cfg.model[key] = None
    model = build_model(cfg).eval()
    if args.weights:
        load_weights(model, args.weights, whole=True)
    elif not OmegaConf.select(cfg, "model.folder"):
        parser.error("the following arguments are required: --weights")
    if swap is None:
        raise UsageError("the config has no model.swap: add model.swap.moe.num_experts=8")
    source = image_files(args.input) if images else build(cfg, "dataloader.train.dataset")
    count = min(args.num_images, len(source))
    chosen = [source[index * len(source) // count] for index in range(count)]
    mapper = build(cfg, "dataloader.test.mapper")
    inputs = [mapper(dataset_dict) for dataset_dict, _ in read_images(chosen)]

    with usage_errors("model.swap"):
        config = instantiate(swap)
        before = predictions(model, inputs)

        def run() -> None:
            predictions(model, inputs)

        if args.report:
            reports = report_coactivation(model, config.moe.num_experts, run, config.layers)
            print(table(reports, config.moe.num_experts))
        calibration = run if config.method == "coactivation" else None
        names = swap_ffn_for_moe(model, config.moe, config.method, config.layers, calibration)
    after = predictions(model, inputs)
    print(f"{', '.join(names)}: experts by method={config.method!r}")
    for what, old, new in zip(("scores", "boxes"), before, after):
        changes = (new - old).abs()
        print(f"{what} change by {changes.mean():.1e} on average, {changes.max():.1e} at most")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() | {"clock.steps": torch.tensor(0)}
    write_atomically(args.output, lambda file: torch.save({"model": state}, file))
    print(f"{args.output}: the swapped model, tried on {len(inputs)} images")


if __name__ == "__main__":
    main()
