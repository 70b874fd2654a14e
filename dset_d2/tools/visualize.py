"""Draw detections on images and, for sparse models, what was kept and which experts were used.

    python -m dset_d2.tools.visualize --config-file CONFIG --weights model_best.pth \\
        --output output/pictures --num-images 12
    ... --input crossing.mp4 'photos/*.jpg' --json-lines found.jsonl
    python -m dset_d2.tools.visualize --weights model.onnx --input photos --output output/pictures

draws the first images of the config's test set, ground truth on the left, or those that --input
names: files, folders, patterns, videos, and streams by their addresses. Each class has one colour,
and a legend tells which. Beside NAME.png (detections) a sparse model gives NAME_kept_*.png (pruned
tokens are dark), NAME_expert_*.png (a colour per expert, on the cells of its tokens or, for those
of the decoder, at the boxes of its queries) and experts.png (load and co-activation over all
images). A video becomes NAME.mp4. --json-lines writes a line for each image or frame, with boxes
x1, y1, x2, y2 in pixels. Files that dset_d2.tools.export wrote (.onnx, .xml) need no config.
--budget-ms with a --latency-table of this machine (dset_d2.tools.latency_table) runs each image
under a setting that fits, chosen by the --controller if there is one.
Names are those of the images, numbered where one would stand for two. The folder of an image that
is read is no place for pictures.
"""

import json
import re
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from ..data.frames import Frame, find_sources, is_video, read_frames, read_header
from ..data.reading import DataError
from ..files import write_atomically
from ..inference import Prediction, Predictor
from ..inference.export import RUNTIMES
from ..inference.predictor import as_record
from ..modeling import MetaArch, forward_context
from ..visualization import (
    Observation,
    detection_picture,
    draw_detections,
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
    check_output,
    class_names,
    entry_point,
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


class Shot(NamedTuple):
    """A picture that detections are drawn on.

    Attributes:
        name: of what is drawn.
        annotations: its ground truth, if there is one.
    """

    name: str
    frame: Frame
    annotations: list[dict] | None = None


class VideoWriter:
    """Writes a video of the frames that it is given; a link in its place is not followed."""

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self.writer: cv2.VideoWriter | None = None
        path.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exception) -> None:
        if self.writer is not None:
            self.writer.release()

    def add(self, picture: np.ndarray) -> None:
        """Append (H, W, 3) RGB uint8."""
        if self.writer is None:
            size, code = picture.shape[1::-1], cv2.VideoWriter.fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(str(self.path), code, self.rate, size)
            if not self.writer.isOpened():
                raise UsageError(f"{self.path}: OpenCV cannot write this video")
        self.writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))


def make_predictor(cfg: DictConfig | None, args: Namespace) -> Predictor:
    """That of an exported file, or of the config's model."""
    if cfg is None:
        with usage_errors("--weights"):
            return Predictor.from_file(args.weights)
    model = build_model(cfg)
    if args.weights:
        load_weights(model, args.weights, whole=True)
    resize = build(cfg, "dataloader.test.mapper").augmentations
    with usage_errors("--budget-ms"):
        return Predictor(model, args.latency_table, args.controller, resize, class_names(cfg))


def input_shots(sources: list[str], folder: Path) -> Iterator[Shot]:
    """Those of images and videos."""
    names = dict(zip(sources, output_names(list(map(Path, sources)), folder)))
    frames = sum(read_header(x).frames if is_video(x) else 1 for x in sources)
    told: list[str] = []  # once the bar is closed
    for frame in tqdm(read_frames(sources, told.append), "drawing", frames or None):
        yield Shot(names[frame.source], frame)
    for text in told:
        print(f"warning: {text}", file=sys.stderr)


def test_shots(cfg: DictConfig, num_images: int, folder: Path) -> Iterator[Shot]:
    """Those of the config's test set, with their ground truth."""
    dataset_dicts = build(cfg, "dataloader.test.dataset")[:num_images]
    names = output_names([Path(x["file_name"]) for x in dataset_dicts], folder)
    dataset_dicts = [x | {"name": name} for x, name in zip(dataset_dicts, names)]
    for x, image in read_images(tqdm(dataset_dicts, desc="drawing")):
        yield Shot(x["name"], Frame(x["file_name"], None, image), x.get("annotations"))


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ConfigToolParser(__doc__, required=False)
    parser.add_argument(
        "--weights", help="of a run, released, or exported; needless if the config has some"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--input", nargs="+", metavar="SOURCE", help="images, folders, videos, ...")
    parser.add_argument("--num-images", type=int, default=12, help="of the test set")
    parser.add_argument("--budget-ms", type=float, help="latency that each image may take")
    parser.add_argument("--latency-table", type=Path, help="what settings take, for --budget-ms")
    parser.add_argument("--controller", type=Path, help="who chooses; default: the slowest")
    parser.add_argument("--threshold", type=float, default=0.4, help="least score drawn")
    parser.add_argument("--json-lines", type=Path, metavar="FILE", help="what was found")
    parser.add_device()
    args = parser.parse_args(argv)
    if args.num_images < 1:
        parser.error("--num-images must be positive")
    if (args.budget_ms is None) != (args.latency_table is None):
        parser.error("--budget-ms and --latency-table go together")
    if args.budget_ms is not None and args.budget_ms <= 0:
        parser.error("--budget-ms must be positive")
    exported = bool(args.weights) and Path(args.weights).suffix in RUNTIMES
    if not args.config_file and not (exported and args.input):
        parser.error("the following arguments are required: --config-file")
    if exported and args.latency_table:
        parser.error("--budget-ms needs a model, not an exported file")

    cfg = None
    if args.config_file:
        cfg = read_config(args.config_file, args.opts, args.device)
        if not (args.weights or own_weights(cfg)):
            parser.error("the following arguments are required: --weights")
    try:
        sources = find_sources(args.input or [])
        if args.json_lines:
            read = [args.config_file, args.weights, *sources]
            check_output(args.json_lines, [path for path in read if path])
        predictor = make_predictor(None if exported else cfg, args)
        if sources:
            shots = input_shots(sources, args.output)
        else:
            shots = test_shots(cfg, args.num_images, args.output)
        draw(predictor, shots, args)
    except DataError as error:
        raise UsageError(str(error)) from error
    print(f"drawn to {args.output}")


def look(
    predictor: Predictor, frame: Frame, budget: float | None
) -> tuple[Observation, Prediction | None]:
    """What a picture shows, and within a budget what it took."""
    inputs = predictor.inputs(frame.image)
    if budget is None and isinstance(predictor.detector, MetaArch):
        return observe(predictor.detector, inputs), None
    with forward_context(record=True) as context:
        found = predictor.predict(inputs, budget)
    return Observation(found.instances.to("cpu"), None, context.records), found


def draw(predictor: Predictor, shots: Iterator[Shot], args: Namespace) -> None:
    """Write pictures of all shots, and what was found on them."""
    classes, folder, threshold = predictor.classes, args.output, args.threshold
    routings, predictions = defaultdict(list), []
    videos: dict[str, VideoWriter] = {}
    with ExitStack() as files:
        lines = None
        for name, frame, annotations in shots:
            folder.mkdir(parents=True, exist_ok=True)
            seen, prediction = look(predictor, frame, args.budget_ms)
            if prediction is not None:
                predictions.append(prediction)
            if args.json_lines and lines is None:
                args.json_lines.parent.mkdir(parents=True, exist_ok=True)
                lines = files.enter_context(open(args.json_lines, "w"))
            if lines is not None:
                record = as_record(frame, seen.instances, classes, threshold)
                lines.write(json.dumps(record) + "\n")
            if frame.number is not None:
                if name not in videos:
                    video = VideoWriter(folder / f"{name}.mp4", read_header(frame.source).rate)
                    videos[name] = files.enter_context(video)
                drawn = draw_detections(frame.image, seen.instances, classes, threshold)
                videos[name].add(drawn)
                continue
            drawn = detection_picture(frame.image, seen.instances, annotations, classes, threshold)
            save(drawn, folder / f"{name}.png")
            pictures = sparsity_pictures(frame.image, seen.records, seen.outputs, threshold)
            for part, picture in pictures.items():
                save(picture, folder / f"{name}_{part}.png")
            for place, routing in routing_records(seen.records).items():
                routings[place].append(routing)
    if routings:
        save(rendered(plot_routing(mean_statistics(routings))), folder / "experts.png")
    if args.budget_ms is not None:
        print(spending(predictions, args.budget_ms))


def spending(predictions: list[Prediction], budget: float) -> str:
    """What of a budget was used, and by which settings."""
    times = np.array([x.milliseconds for x in predictions])
    text = f"budget of {budget:g} ms: median {np.median(times):.1f} ms, "
    lines = [text + f"{(times > budget).sum()} of {len(times)} images took longer"]
    for setting, count in Counter(str(x.setting) for x in predictions).most_common():
        lines.append(f"{count:6d} x {setting}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
