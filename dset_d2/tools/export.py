"""Export a detector for onnxruntime, OpenVINO or torch.export, and compare the file with PyTorch.

    python -m dset_d2.tools.export --config-file CONFIG --weights model_best.pth \\
        --format onnx --output model.onnx

The file takes batches of any length of RGB images (uint8, of dataloader.image_size; with
--dynamic-size of other sizes too) and gives detections, or with --raw what the last decoder layer
predicts. It is then run on the first images of the config's test set, or those that --input names:
99 % of the detections must have their like in those of PyTorch, of equal class, with an IoU of at
least 0.99 and scores within 0.001. --evaluate adds the AP of both on the test set. A file that
differs is reported as an error, and stays for examination.

--int8 (OpenVINO) quantises the backbone and the encoder, whose ranges of values it learns from
images of the training set or of --calibration; the decoder and experts stay in float32. Such a file
differs: --evaluate tells what that costs. It is faster on CPUs with instructions for it (VNNI).

Experts compute only the rows that are routed to them; model.encoder.moe.dispatch=dense (also
decoder, backbone) exports the form that runs all experts on all rows instead.
"""

import logging
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.evaluation import inference_on_dataset, print_csv_format
from omegaconf import DictConfig
from tqdm import tqdm

from ..inference.export import (
    AGREEMENT,
    FORMATS,
    ExportedDetector,
    ExportInfo,
    TracedDetector,
    agreement,
    export_detector,
)
from ..modeling import DETRDetector
from .common import (
    ConfigToolParser,
    UsageError,
    build,
    build_model,
    check_output,
    class_names,
    entry_point,
    image_files,
    image_size,
    in_one_line,
    load_weights,
    read_config,
    read_images,
)


def describe(cfg: DictConfig, model: DETRDetector, args) -> ExportInfo:
    """What the file will say of itself."""
    return ExportInfo(
        classes=tuple(class_names(cfg)),
        image_size=image_size(cfg),
        outputs="raw" if args.raw else "detections",
        max_detections=model.max_detections,
        dynamic_size=args.dynamic_size,
        divisor=model.size_divisibility,
        random_weights=args.weights is None,
        precision="int8" if args.int8 else "float32",
    )


@torch.no_grad()
def compare(model: DETRDetector, exported: ExportedDetector, inputs: list[dict]) -> list[float]:
    """The agreement of both on each image; they run one after the other."""
    shares = []
    for x in tqdm(inputs, desc="comparing"):
        found, expected = (detector([x])[0]["instances"] for detector in (exported, model))
        shares.append(agreement(found, expected))
    return shares


def evaluate(cfg: DictConfig, detectors: dict) -> None:
    """Print the metrics of each detector on the config's test set."""
    for name, detector in detectors.items():
        loader, evaluator = build(cfg, "dataloader.test"), build(cfg, "dataloader.evaluator")
        print(f"{name}:")
        print_csv_format(inference_on_dataset(detector, loader, evaluator))


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ConfigToolParser(__doc__)
    parser.add_argument("--weights", help="of a run, or released; without, they are random")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--raw", action="store_true", help="predictions without post-processing")
    parser.add_argument("--dynamic-size", action="store_true", help="images of other sizes, too")
    parser.add_argument("--input", nargs="+", type=Path, default=[], metavar="FILE_OR_FOLDER")
    parser.add_argument("--num-images", type=int, default=8, help="of the test set, to compare on")
    parser.add_argument("--evaluate", action="store_true", help="AP of the file and of PyTorch")
    parser.add_argument("--int8", action="store_true", help="quantise backbone and encoder")
    parser.add_argument("--calibration", nargs="+", type=Path, default=[], metavar="FILE_OR_FOLDER")
    parser.add_argument("--num-calibration", type=int, default=128, help="images, spread over all")
    args = parser.parse_args(argv)
    if min(args.num_images, args.num_calibration) < 1:
        parser.error("--num-images and --num-calibration must be positive")
    if args.int8 and args.format != "openvino":
        parser.error("--int8 goes with --format openvino")
    if args.output.suffix != FORMATS[args.format]:
        parser.error(f"--output {args.output}: must end in {FORMATS[args.format]}")
    images, others = image_files(args.input), image_files(args.calibration)
    read = [args.weights] if args.weights else []
    check_output(
        args.output, [args.config_file, *read, *(x["file_name"] for x in [*images, *others])]
    )

    cfg = read_config(args.config_file, args.opts, "cpu")
    model = build_model(cfg).eval()
    if not isinstance(model, DETRDetector):
        raise UsageError(f"{args.config_file}: a {type(model).__name__} cannot be exported")
    if args.weights:
        load_weights(model, args.weights, whole=True)
    else:
        print("no --weights: they are random, and so are the detections", file=sys.stderr)
    images = images or build(cfg, "dataloader.test.dataset")[: args.num_images]
    mapper = build(cfg, "dataloader.test.mapper")
    inputs = [mapper(x) for x, _ in read_images(images)]

    if args.dynamic_size:  # compared at two
        edge = (0, model.size_divisibility) * 2
        inputs += [x | {"image": F.pad(x["image"], edge)} for x in inputs[:1]]

    calibration = []
    if args.int8:
        source = others or build(cfg, "dataloader.train.dataset")
        count = min(args.num_calibration, len(source))
        chosen = [source[index * len(source) // count] for index in range(count)]
        calibration = [mapper(x)["image"] for x, _ in read_images(chosen)]

    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # of what it does not fold
    args.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        info = describe(cfg, model, args)
        export_detector(model, args.output, args.format, info, calibration)
    except (ImportError, ValueError) as error:
        raise UsageError(in_one_line(error)) from error
    traced = args.format == "torch_export"
    exported = TracedDetector(args.output) if traced else ExportedDetector(args.output)
    shares = compare(model, exported, inputs)
    about = f"{min(shares):.2%} of the detections agree with PyTorch's on the worst of"
    print(f"{args.output}: {about} {len(shares)} images")
    if args.evaluate:
        evaluate(cfg, {str(args.output): exported, "PyTorch": model})
    if min(shares) < AGREEMENT and not args.int8:
        print(f"error: {args.output} differs from PyTorch", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
