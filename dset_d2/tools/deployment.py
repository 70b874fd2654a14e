"""Deployed speed: detectors in PyTorch, compiled, and as files for onnxruntime and OpenVINO.

    python -m dset_d2.tools.deployment --output output/deployment \\
        --config-file configs/rtdetr/rtdetrv2_r18_coco.py configs/dfine/dfine_s_coco.py \\
        projects/dset/configs/dset_s_dair_v2x.py projects/dset/configs/dset_dinov3_s_coco.py \\
        --trained projects/dset/configs/dset_r18_roadside.py output/demo/model_best.pth

times every form of every config in turn, round by round (A B C A B C ...), beside the same networks
of transformers where it has them, with random weights on noise images of dataloader.image_size.
What a runtime cannot run is left blank, and why is told. --trained CONFIG WEIGHTS evaluates each
form of a trained model on its test set: what it costs in AP. int8 is OpenVINO's, with a decoder in
float32; it is calibrated on noise, but where it is evaluated on images of the training set.
The folder gets deployment.md and deployment.json.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from detectron2.evaluation import inference_on_dataset
from omegaconf import DictConfig
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from ..analysis import measure
from ..analysis.peers import PEERS, Peer
from ..files import write_atomically
from ..inference import ExportedDetector, ExportInfo, optimize_for_inference
from ..inference.export import FORMATS, capture, onnx_model, save_onnx, trace
from .common import (
    ConfigToolParser,
    build,
    build_model,
    class_names,
    describe_device,
    entry_point,
    image_size,
    in_one_line,
    load_weights,
    noise_image,
    read_config,
    read_configs,
    read_images,
    write_json,
)

Detector = Callable[[list[dict]], list[dict]]
CALIBRATION = 32  # images
WARMUP = 2  # rounds
LIBRARIES = ("torch", "transformers", "onnxruntime", "openvino", "nncf")


@dataclass
class Subject:
    """A model that is deployed in several forms.

    Attributes:
        folder: takes the files.
        calibration: (3, H, W) uint8 images.
        errors: why forms could not be made, by their names.
    """

    model: nn.Module
    classes: tuple[str, ...]
    size: tuple[int, int]
    folder: Path
    calibration: list[Tensor]
    peer: Callable[[], nn.Module] | None = None
    errors: dict[str, str] = field(default_factory=dict)

    def info(self, precision: str = "float32") -> ExportInfo:
        count = getattr(self.model, "max_detections", 300)
        divisor = self.model.size_divisibility
        return ExportInfo(
            self.classes, self.size, max_detections=count, divisor=divisor, precision=precision
        )

    def exported(self, format: str, precision: str = "float32") -> Detector:
        path = self.folder / f"{format}_{precision}{FORMATS[format]}"
        save_onnx(self.onnx, path, format, self.info(precision), self.calibration)
        return ExportedDetector(path)

    @cached_property
    def onnx(self):
        """The model of all its files; making it takes longest."""
        info = self.info()
        return onnx_model(trace(self.model, info), info.outputs)

    def inputs(self, batch: int) -> list[dict]:
        return [{"image": noise_image(*self.size, seed=seed)} for seed in range(batch)]

    def make(self, form: str, batch_sizes: Sequence[int] = (1,)) -> Detector | None:
        """The form, once it ran with each batch; or None with the reason among the errors."""
        if self.peer is None and form.startswith("transformers"):
            return None
        try:
            detector = FORMS[form](self)
            with torch.inference_mode():
                for batch in batch_sizes:
                    detector(self.inputs(batch))
        except Exception as error:  # of all the libraries
            self.errors[form] = in_one_line(error)
            return None
        return detector


def compiled(subject: Subject) -> Detector:
    torch._inductor.config.freezing = True  # weights are constants
    torch._dynamo.config.recompile_limit = 64  # models and batches are variants of the same code
    model = optimize_for_inference(subject.model)
    model.predict = torch.compile(model.predict, fullgraph=True, dynamic=False)
    return model


def exported_peer(subject: Subject) -> Detector:
    """A file for each length of a batch, which the peer's code fixes."""
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"  # checks that ONNX has no operator for
    info, graph = subject.info(), Peer(subject.peer()).graph

    @cache
    def exported(batch: int) -> Detector:
        path = subject.folder / f"peer_{batch}.onnx"
        save_onnx(onnx_model(capture(graph, info, batch), info.outputs), path, "onnx", info)
        return ExportedDetector(path)

    return lambda inputs: exported(len(inputs))(inputs)


FORMS: dict[str, Callable[[Subject], Detector]] = {
    "transformers": lambda subject: Peer(subject.peer()),
    "transformers, onnxruntime": exported_peer,
    "eager": lambda subject: subject.model,
    "optimised": lambda subject: optimize_for_inference(subject.model),
    "compiled": compiled,
    "onnxruntime": lambda subject: subject.exported("onnx"),
    "openvino": lambda subject: subject.exported("openvino"),
    "int8": lambda subject: subject.exported("openvino", "int8"),
}


def time_forms(subjects: dict[str, Subject], batch_sizes: list[int], rounds: int) -> list[dict]:
    """A row per model, form and batch; times in seconds, None where there is no such form."""
    pairs = list(itertools.product(subjects, FORMS))
    forms = {
        (name, form): subjects[name].make(form, batch_sizes)
        for name, form in tqdm(pairs, desc="making forms")
    }
    rows = []
    for batch in batch_sizes:
        calls = {}
        for (name, form), detector in forms.items():
            if detector is not None:
                calls[f"{name}\n{form}"] = partial(detector, subjects[name].inputs(batch))
        with torch.inference_mode():
            latencies = measure(calls, rounds, min(WARMUP, rounds))
        for name, form in forms:
            row = {"config": name, "form": form, "batch_size": batch, "seconds": None}
            if latency := latencies.get(f"{name}\n{form}"):
                row |= {"seconds": latency.median, "quartiles": latency.quartiles}
            rows.append(row | {"error": subjects[name].errors.get(form)})
    return rows


def evaluate_forms(path: str, weights: str, output: Path, folder: Path) -> list[dict]:
    """A row with the AP of each form of a trained model on its config's test set."""
    cfg = read_config(path, [f"train.output_dir={output / 'evaluation'}"], "cpu")
    subject = make_subject(path, cfg, folder)
    load_weights(subject.model, weights, whole=True)
    mapper = build(cfg, "dataloader.test.mapper")
    images = build(cfg, "dataloader.train.dataset")[:CALIBRATION]
    subject.calibration = [mapper(x)["image"] for x, _ in read_images(images)]
    rows = []
    for form in FORMS:
        detector = subject.make(form)
        row: dict = {"config": path, "form": form, "AP": None}
        if detector is not None:
            loader, evaluator = build(cfg, "dataloader.test"), build(cfg, "dataloader.evaluator")
            with torch.inference_mode():
                row["AP"] = inference_on_dataset(detector, loader, evaluator)["bbox"]["AP"]
        rows.append(row | {"error": subject.errors.get(form)})
    return rows


def make_subject(name: str, cfg: DictConfig, folder: Path) -> Subject:
    """A config's model with random weights, and noise to calibrate it on."""
    folder.mkdir()
    size = image_size(cfg)
    noise = [noise_image(*size, seed=seed) for seed in range(CALIBRATION)]
    classes = tuple(class_names(cfg))
    return Subject(build_model(cfg).eval(), classes, size, folder, noise, PEERS.get(name))


def cpu_features() -> list[str]:
    """Instructions that deep networks use, of the CPU that Linux describes; else none."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n")[0].split())
    except (OSError, IndexError):
        return []
    known = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return [flag for flag in known if flag in flags]


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(rows: list[dict], evaluated: list[dict]) -> str:
    """A table per batch, and why there are blanks: each model's milliseconds in every form, with
    the speed in units of the first form that it has; in the first table the APs, too."""
    forms, names, batches = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("form", "config", "batch_size")
    )
    seconds = {(x["form"], x["config"], x["batch_size"]): x["seconds"] for x in rows}
    scores = {row["form"]: row["AP"] for row in evaluated}
    texts = []
    for batch in batches:
        units = {
            name: next(filter(None, (seconds[x, name, batch] for x in forms)), 0.0)
            for name in names
        }
        lines = []
        for form in forms:
            times = {name: seconds[form, name, batch] for name in names}
            line = [
                form,
                *(x and f"{1e3 * x:.0f} ({units[name] / x:.2f})" for name, x in times.items()),
            ]
            if scores and batch == batches[0]:
                line.append(scores[form] and f"{scores[form]:.1f}")
            lines.append(line)
        heads = [f"batch {batch}: ms (speed)", *names]
        if scores and batch == batches[0]:
            heads.append(f"AP of {Path(evaluated[0]['config']).stem}")
        texts.append(tabulate(lines, heads, tablefmt="github", disable_numparse=True))
    failed = {
        f"{x['config']}, {x['form']}: {x['error']}" for x in [*rows, *evaluated] if x["error"]
    }
    return "\n\n".join([*texts, *sorted(failed)])


def write_report(output: Path, about: dict, rows: list[dict], evaluated: list[dict]) -> str:
    """The Markdown of the two files."""
    libraries = (f"{name} {number}" for name, number in about["versions"].items())
    features = " ".join(about["features"])
    head = [about["device"], features, *libraries, f"{about['rounds']} rounds"]
    text = f"{'; '.join(filter(None, head))}\n\n{table(rows, evaluated)}\n"
    write_json(output / "deployment.json", about | {"speed": rows, "AP": evaluated})
    write_atomically(output / "deployment.md", lambda file: file.write(text.encode()))
    return text


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ConfigToolParser(__doc__, several=True)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--trained", nargs=2, metavar=("CONFIG", "WEIGHTS"), help="gives the AP")
    args = parser.parse_args(argv)
    if min(args.rounds, *args.batch_size) < 1:
        parser.error("--rounds and --batch-size must be positive")

    about = {
        "device": describe_device("cpu"),
        "features": cpu_features(),
        "versions": versions(),
        "rounds": args.rounds,
    }
    configs = read_configs(args.config_file, args.opts, "cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    evaluated = []
    with tempfile.TemporaryDirectory() as folder:
        if args.trained:  # first, since it is short and what is asked for may be wrong
            path, weights = args.trained
            evaluated = evaluate_forms(path, weights, args.output, Path(folder, "trained"))
            write_report(args.output, about, [], evaluated)
        subjects = {
            name: make_subject(name, cfg, Path(folder, str(index)))
            for index, (name, cfg) in enumerate(configs.items())
        }
        rows = time_forms(subjects, args.batch_size, args.rounds)
    text = write_report(args.output, about, rows, evaluated)
    print(text)


if __name__ == "__main__":
    main()
