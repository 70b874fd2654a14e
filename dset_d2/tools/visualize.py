"""Draw detections on images and, for sparse models, what was kept and which experts were used.

    python -m dset_d2.tools.visualize --config-file CONFIG --weights model_best.pth \\
        --output output/pictures --num-images 12

draws the first images of the config's test set, ground truth on the left, or those that --input
names. Each class has one colour, and a legend tells which. Beside NAME.png (detections) a sparse
model gives NAME_kept_*.png (pruned tokens are dark), NAME_expert_*.png (a colour per expert, on the
cells of its tokens or, for those of the decoder, at the boxes of its queries) and experts.png (load
and co-activation over all images). --budget-ms with a --latency-table of this machine
(dset_d2.tools.latency_table) runs each image under a setting that fits, chosen by the --controller
if there is one.
Names are those of the images, numbered where one would stand for two. The folder of an image that
is read is no place for pictures.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..files import write_atomically
from ..inference import Prediction, Predictor
from ..modeling import forward_context
from ..visualization import (
    Observation,
    detection_picture,
    mean_statistics,
    observe,
    plot_routing,
    rendered,
    routing_records,
    sparsity_pictures,
)
from .common import (
    ConfigToolParser,
    UsageError,
    build,
    build_model,
    class_names,
    entry_point,
    image_files,
    load_weights,
    own_weights,
    read_config,
    read_images,
    usage_errors,
)

# What an image's name may not be like, so that no picture of another one has it.
PICTURE = re.compile(r"_(kept|expert)_|^experts$")


def output_names(files: list[Path], folder: Path) -> list[str]:
    """A name for each image's pictures; none of these stands for two, nor replaces an image.

    Raises:
        UsageError: if the folder holds one of the images.
    """
    check_folder(folder, files)
    names = [file.stem for file in files]
    distinct = len({name.casefold() for name in names}) == len(names)
    if distinct and not any(map(PICTURE.search, names)):
        return names
    digits = len(str(len(names)))
    return [f"{index:0{digits}}_{name}" for index, name in enumerate(names, 1)]


def check_folder(folder: Path, files: list[Path]) -> None:
    """Raise a :class:`UsageError` if pictures in a folder might replace one of the images."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder}: is a file, not a folder for pictures")
    for file in files:
        if folder.resolve() in (file.parent.resolve(), file.resolve().parent):
            raise UsageError(f"--output {folder}: holds the input {file}; name another folder")


def save(picture: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) uint8 as PNG; a link in the path's place is replaced, not followed."""
    write_atomically(path, lambda file: Image.fromarray(picture).save(file, format="png"))


def spending(predictions: list[Prediction], budget: float) -> str:
    """What of a budget was used, and by which settings."""
    times = np.array([x.milliseconds for x in predictions])
    text = f"budget of {budget:g} ms: median {np.median(times):.1f} ms, "
    lines = [text + f"{(times > budget).sum()} of {len(times)} images took longer"]
    for setting, count in Counter(str(x.setting) for x in predictions).most_common():
        lines.append(f"{count:6d} x {setting}")
    return "\n".join(lines)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ConfigToolParser(__doc__)
    parser.add_argument("--weights", help="of a run, or released; needless if the config has some")
    parser.add_argument("--output", type=Path, required=True, help="folder for the PNG files")
    parser.add_argument("--input", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument("--num-images", type=int, default=12, help="of the test set")
    parser.add_argument("--budget-ms", type=float, help="latency that each image may take")
    parser.add_argument("--latency-table", type=Path, help="what settings take, for --budget-ms")
    parser.add_argument("--controller", type=Path, help="who chooses; default: the slowest")
    parser.add_argument("--threshold", type=float, default=0.4, help="least score drawn")
    parser.add_device()
    args = parser.parse_args(argv)
    if args.num_images < 1:
        parser.error("--num-images must be positive")
    if (args.budget_ms is None) != (args.latency_table is None):
        parser.error("--budget-ms and --latency-table go together")
    if args.budget_ms is not None and args.budget_ms <= 0:
        parser.error("--budget-ms must be positive")

    cfg = read_config(args.config_file, args.opts, args.device)
    if not (args.weights or own_weights(cfg)):
        parser.error("the following arguments are required: --weights")
    model = build_model(cfg).eval()
    if args.weights:
        load_weights(model, args.weights, whole=True)
    predictor = None
    if args.latency_table:
        with usage_errors("--budget-ms"):
            predictor = Predictor(model, args.latency_table, args.controller)
    mapper = build(cfg, "dataloader.test.mapper")
    if args.input:
        dataset_dicts = image_files(args.input)
    else:
        dataset_dicts = build(cfg, "dataloader.test.dataset")[: args.num_images]
    names = output_names([Path(x["file_name"]) for x in dataset_dicts], args.output)
    dataset_dicts = [x | {"name": name} for x, name in zip(dataset_dicts, names)]
    classes = class_names(cfg)
    args.output.mkdir(parents=True, exist_ok=True)
    routings = defaultdict(list)
    predictions: list[Prediction] = []
    for dataset_dict, image in read_images(tqdm(dataset_dicts, desc="drawing")):
        height, width = image.shape[:2]
        inputs = mapper(dataset_dict) | {"height": height, "width": width}
        if predictor is None:
            seen = observe(model, inputs)
        else:
            with forward_context(record=True) as context:
                predictions.append(predictor.predict(inputs, args.budget_ms))
            seen = Observation(predictions[-1].instances.to("cpu"), None, context.records)
        annotations = dataset_dict.get("annotations")
        drawn = detection_picture(image, seen.instances, annotations, classes, args.threshold)
        name = dataset_dict["name"]
        save(drawn, args.output / f"{name}.png")
        pictures = sparsity_pictures(image, seen.records, seen.outputs, args.threshold)
        for part, picture in pictures.items():
            save(picture, args.output / f"{name}_{part}.png")
        for place, routing in routing_records(seen.records).items():
            routings[place].append(routing)
    if routings:
        save(rendered(plot_routing(mean_statistics(routings))), args.output / "experts.png")
    if predictions:
        print(spending(predictions, args.budget_ms))
    print(f"drawn to {args.output}")


if __name__ == "__main__":
    main()
