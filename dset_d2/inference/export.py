"""Detectors as files for other runtimes: written, run, and compared with the model.

A file takes (B, 3, H, W) RGB uint8 images of one size, for it normalises them itself, and gives
either detections (boxes x1, y1, x2, y2 in [0, 1], scores, classes; best first) or the raw
predictions (``pred_logits``, ``pred_boxes`` cx, cy, w, h in [0, 1]). What it is made for stands
within it, as JSON (:class:`ExportInfo`).
"""

import copy
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.ops import box_iou

from ..files import write_atomically
from ..modeling import DETRDetector
from ..modeling.layers import check_choice
from ..modeling.meta_arch import Detections, best_detections, to_instances
from ..modeling.sparse import MemoryPruner, TokenPruner
from .optimize import optimize_for_inference

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch_export": ".pt2"}
OUTPUTS = {"detections": Detections._fields, "raw": ("pred_logits", "pred_boxes")}
PRECISIONS = ("float32", "int8")
# Of what is quantised. The decoder's boxes and scores do not survive eight bits.
QUANTISED = ("'model.backbone'", "'model.encoder'")
EXPERTS = ".experts'"
KEY = "dset_d2"  # of the entry in a file that says what it is
OPSET = 20
MAX_BATCH = 1024
SHAPES = 8  # that a file is kept compiled for
Run = Callable[[np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class ExportInfo:
    """What an exported file says of itself.

    Args:
        classes: their names, in the order of their numbers.
        image_size: (height, width) that images are resized to.
        outputs: "detections" or "raw".
        max_detections: detections of each image.
        dynamic_size: whether images may also have other sizes, in whole ``divisor`` pixels.
        divisor: of heights and widths.
        random_weights: whether the model had learned nothing.
        precision: "float32", or "int8" of a backbone and encoder that were quantised.
    """

    classes: tuple[str, ...]
    image_size: tuple[int, int]
    outputs: str = "detections"
    max_detections: int = 300
    dynamic_size: bool = False
    divisor: int = 32
    random_weights: bool = False
    precision: str = "float32"

    def __post_init__(self) -> None:
        if not self.classes or not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"classes={self.classes!r} must be names, at least one")
        for name in ("max_detections", "divisor"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive whole number")
        if len(self.image_size) != 2 or not all(map(is_count, self.image_size)):
            raise ValueError(f"image_size={self.image_size!r} must be a height and a width")
        if any(side % self.divisor for side in self.image_size):
            raise ValueError(
                f"image_size={list(self.image_size)} must be whole multiples of {self.divisor}"
            )
        check_choice("outputs", self.outputs, OUTPUTS)
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("dynamic_size", "random_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ExportInfo":
        """The contrary of :meth:`to_json`.

        Raises:
            ValueError: if it is not what a file of this package says.
        """
        values = json.loads(text)
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"{text[:80]!r} must have the entries {', '.join(sorted(names))}")
        for name in ("classes", "image_size"):
            if not isinstance(values[name], list):
                raise ValueError(f"{name}={values[name]!r} must be a list")
            values[name] = tuple(values[name])
        return cls(**values)


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Graph(nn.Module):
    """What a file computes: (B, 3, H, W) uint8 -> its outputs."""

    def __init__(self, model: DETRDetector, outputs: str) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model.predict((images - self.model.pixel_mean) / self.model.pixel_std)
        if self.outputs == "detections":
            return tuple(self.model.detections(outputs))
        return tuple(outputs[name] for name in OUTPUTS["raw"])


def trace(model: DETRDetector, info: ExportInfo) -> ExportedProgram:
    """The graph of a model, which is optimised, for batches of any length.

    Raises:
        ValueError: if a dynamic size is asked for and some part of the model needs to know it.
    """
    refusal = "dynamic_size=True: the model has a part that needs to know the size"
    pruners = [m for m in model.modules() if isinstance(m, TokenPruner | MemoryPruner)]
    if info.dynamic_size and pruners:  # they keep a number of tokens
        raise ValueError(f"{refusal}: {pruners[0].record_name}")
    graph = Graph(optimize_for_inference(model).cpu(), info.outputs)
    try:
        return capture(graph, info)
    except Exception as error:  # of several kinds
        if not info.dynamic_size:
            raise
        raise ValueError(refusal) from error


@torch.no_grad()
def capture(graph: nn.Module, info: ExportInfo, batch: int | None = None) -> ExportedProgram:
    """The operators of a module that takes (B, 3, H, W) uint8 images; of any B, or of ``batch``."""
    dims: dict[int, Dim] = {} if batch else {0: Dim("batch", min=1, max=MAX_BATCH)}
    if info.dynamic_size:
        dims |= {2: info.divisor * Dim("rows", min=2), 3: info.divisor * Dim("columns", min=2)}
    images = torch.zeros(batch or 2, 3, *info.image_size, dtype=torch.uint8)
    return torch.export.export(graph, (images,), dynamic_shapes=(dims,), strict=False)


def export_detector(
    model: DETRDetector,
    path: str | Path,
    format: str,
    info: ExportInfo,
    calibration: Sequence[Tensor] = (),
) -> None:
    """Write a model as a file; an OpenVINO file has a second one with its weights beside it.

    The model is optimised first (:func:`optimize_for_inference`); its experts compute the rows
    that are routed to them only, but for those with ``dispatch="dense"``.

    Args:
        calibration: (3, H, W) uint8 images as the file will see, which tell the range of values
            where the precision is int8.

    Raises:
        ValueError: if the settings do not fit the format, the model or each other.
        ImportError: without the packages of the format.
    """
    check_choice("format", format, FORMATS)
    if info.precision == "int8" and (format != "openvino" or not calibration):
        raise ValueError("precision='int8' needs calibration images and the format openvino")
    program = trace(model, info)
    if format == "torch_export":
        files = {KEY: info.to_json()}
        write_atomically(path, lambda file: torch.export.save(program, file, extra_files=files))
        return
    save_onnx(onnx_model(program, info.outputs), path, format, info, calibration)


def onnx_model(program: ExportedProgram, outputs: str):
    """An ``onnx.ModelProto`` whose nodes say which module of the model they come from."""
    library("onnxscript")
    names = list(OUTPUTS[outputs])
    return torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=names,
        verbose=False,
    ).model_proto  # fmt: skip


def save_onnx(
    proto, path: str | Path, format: str, info: ExportInfo, calibration: Sequence[Tensor] = ()
) -> None:
    """Write what :func:`onnx_model` made, which is left as it is, as an ONNX or OpenVINO file."""
    if format == "onnx":
        proto = copy.deepcopy(proto)
        for node in proto.graph.node:  # else with names of this machine's files
            del node.metadata_props[:]
        proto.metadata_props.add(key=KEY, value=info.to_json())
        write_atomically(path, lambda file: file.write(proto.SerializeToString()))
        return
    openvino = library("openvino")
    model = openvino.Core().read_model(proto.SerializeToString())
    if info.precision == "int8":
        model = quantised(model, proto, calibration)
    model.set_rt_info(info.to_json(), [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)


def quantised(model, proto, calibration: Sequence[Tensor]):
    """An ``openvino.Model`` with products of eight bits in backbone and encoder. The decoder stays
    as it was, and so do experts, for those that no image reaches have no range of values.

    Args:
        proto: the ONNX model that it was made from, which knows the modules.
    """
    nncf = library("nncf")
    nncf.set_log_level(logging.ERROR)  # else it names every operator that is left as it is
    quantise = set()
    for node in proto.graph.node:
        place = {x.key: x.value for x in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
        if EXPERTS not in place and any(part in place for part in QUANTISED):
            quantise.add(node.name)
    names = [operator.get_friendly_name() for operator in model.get_ops()]
    kept = [name for name in names if name.split("/")[0] not in quantise]  # a part is node/part
    return nncf.quantize(
        model,
        nncf.Dataset(calibration, lambda image: {"images": image[None].numpy()}),
        preset=nncf.QuantizationPreset.MIXED,  # SiLU's and GELU's values are not symmetric
        subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=kept),
    )


def library(name: str) -> ModuleType:
    """A package of the extra ``export``, or ``quantize``."""
    try:
        return import_module(name)
    except ImportError as error:
        extra = "quantize" if name == "nncf" else "export"
        raise ImportError(f"{error}: pip install 'dset_d2[{extra}]'") from error


# Running a file.


def run_onnx(path: Path, threads: int) -> tuple[Run, str]:
    """A function that runs an ONNX file by onnxruntime, and what the file says of itself."""
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    entry = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return lambda images: session.run(None, {"images": images}), entry


def run_openvino(path: Path, threads: int) -> tuple[Run, str]:
    """As :func:`run_onnx`, of an OpenVINO file, compiled for each shape that images come in.

    That is faster, and right: with shapes left open, OpenVINO 2026.4 computes convolutions of eight
    bits wrongly on CPUs with AVX-512.
    """
    openvino = library("openvino")
    core = openvino.Core()
    model = core.read_model(path)
    entry = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else ""
    # Float operators in float32, also where the CPU multiplies bfloat16.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}

    @lru_cache(SHAPES)
    def compiled(shape: tuple[int, ...]):
        model.reshape(shape)
        return core.compile_model(model, "CPU", options)

    return lambda images: list(compiled(images.shape)(images).values()), entry


RUNTIMES = {".onnx": run_onnx, ".xml": run_openvino}


class ExportedDetector:
    """A file that :func:`export_detector` wrote, to be called as a detector is: Detectron2's dicts
    in and out.

    Nothing in the file is code of Python. Files of torch.export may hold such: who trusts one loads
    it by ``torch.export.load``.

    Args:
        threads: of the runtime; None for as many as torch has.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none of this package.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        path = Path(path)
        if path.suffix not in RUNTIMES:
            raise ValueError(f"{path}: must end in one of {', '.join(RUNTIMES)}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            self.run, entry = RUNTIMES[path.suffix](path, threads or torch.get_num_threads())
        except ImportError:
            raise
        except Exception as error:  # runtimes have kinds of their own
            raise ValueError(f"{path}: cannot be read: {error}") from error
        if not entry:
            raise ValueError(f"{path}: was not exported by dset_d2: it has no entry {KEY!r}")
        try:
            self.info = ExportInfo.from_json(entry)
        except ValueError as error:
            raise ValueError(f"{path}: its entry {KEY!r} is wrong: {error}") from None

    def __call__(self, batched_inputs: list[dict]) -> list[dict]:
        """As :meth:`MetaArch.forward` in inference; images of one shape run as one batch.

        Raises:
            ValueError: on an image of a size or type that the file is not made for.
        """
        groups = defaultdict(list)
        for index, x in enumerate(batched_inputs):
            groups[self.checked_size(x["image"])].append(index)
        found: list = [None] * len(batched_inputs)
        for (height, width), group in groups.items():
            inputs = [batched_inputs[index] for index in group]
            images = np.stack([np.asarray(x["image"]) for x in inputs])
            sizes = [(x.get("height", height), x.get("width", width)) for x in inputs]
            instances = to_instances(self.detections(self.run(images)), sizes)
            for index, detected in zip(group, instances):
                found[index] = {"instances": detected}
        return found

    def checked_size(self, image: Tensor) -> tuple[int, int]:
        if image.dtype != torch.uint8:
            raise ValueError(f"an image of {image.dtype}: the file takes torch.uint8")
        height, width = image.shape[1:]
        info = self.info
        if (height, width) == info.image_size:
            return height, width
        if not info.dynamic_size:
            raise ValueError(
                f"an image of {height} x {width}: the file takes "
                f"{info.image_size[0]} x {info.image_size[1]} only"
            )
        if height % info.divisor or width % info.divisor or min(height, width) < 2 * info.divisor:
            raise ValueError(
                f"an image of {height} x {width}: the file takes whole multiples of "
                f"{info.divisor}, at least two"
            )
        return height, width

    def detections(self, outputs: list[np.ndarray]) -> Detections:
        tensors = [torch.as_tensor(np.asarray(output)) for output in outputs]
        if self.info.outputs == "detections":
            return Detections(*tensors)
        named = dict(zip(OUTPUTS["raw"], tensors))
        return best_detections(named, self.info.max_detections)


class TracedDetector(ExportedDetector):
    """A torch.export file that this process has written itself, for its comparison.

    Loading may run code that the file holds.
    """

    def __init__(self, path: str | Path) -> None:
        files = {KEY: ""}
        module = torch.export.load(path, extra_files=files).module()
        self.info = ExportInfo.from_json(files[KEY])
        self.run = lambda images: [x.detach().numpy() for x in module(torch.from_numpy(images))]


# Comparing.

IOU, SCORE = 0.99, 1e-3  # what detections that are the same have at least, and differ by at most
AGREEMENT = 0.99  # of the detections have the same one in the other list


def agreement(found: Instances, expected: Instances) -> float:
    """The share of the detections of two lists for which the other one has one of equal class, with
    an IoU of at least 0.99 and a score that differs by at most 1e-3; 1 for two empty lists.

    It hardly matters which of two that tie at the end of a list, or of a choice of queries, is in.
    """
    same = box_iou(found.pred_boxes.tensor, expected.pred_boxes.tensor) >= IOU
    same &= found.pred_classes[:, None] == expected.pred_classes
    same &= (found.scores[:, None] - expected.scores).abs() <= SCORE
    matched = torch.cat([same.any(1), same.any(0)])
    return matched.float().mean().item() if len(matched) else 1.0
