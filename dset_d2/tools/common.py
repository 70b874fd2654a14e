"""What the tools have in common: their command lines, and loading what these name."""

import argparse
import difflib
import functools
import json
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..checkpoint import load_upstream
from ..config import PACKAGE, apply_overrides, load_config
from ..data.checks import count_classes
from ..data.coco import to_coco
from ..data.frames import IMAGES, find_sources
from ..data.mapper import read_picture
from ..data.reading import DataError
from ..files import write_atomically

OVERRIDE = re.compile(r"\+?[\w.]+=")
UNREGISTERED = re.compile(r"Dataset '(.*)' is not registered")  # Detectron2's, then all that are
WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
NAMED = 3  # damaged images that a warning names


class UsageError(Exception):
    """The command line asks for what cannot be had; the message says why in one line."""


def entry_point(main: Callable) -> Callable:
    """Makes a tool's ``main(argv)`` end in one line on a :class:`UsageError`, with argparse's 2."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run


@contextmanager
def usage_errors(where: str) -> Iterator[None]:
    """Whatever fails inside becomes a :class:`UsageError` that begins with ``where``.

    For what a user wrote or named: configs are code, and values that are wrong may fail anywhere.
    """
    try:
        yield
    except Exception as error:
        raise UsageError(f"{where}: {in_one_line(error)}") from error


def in_one_line(error: Exception) -> str:
    """An error's message; also its kind and its place in a user's file if it is no sentence."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, OSError | ValueError):
        return text
    if unknown := UNREGISTERED.search(text):
        return f"no data set {unknown[1]!r}{nearest(unknown[1], DatasetCatalog)}"
    if isinstance(error, SyntaxError) and error.__cause__:  # Detectron2's does not say where
        text += f" {error.__cause__}"
    frames = traceback.extract_tb(error.__traceback__)
    known = ("site-packages", f"{PACKAGE}/", "<")
    places = [frame for frame in frames if not any(part in frame.filename for part in known)]
    place = f" ({places[-1].filename}, line {places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {text}{place}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint, for the end of a message, at the known name that is meant; "" if none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; the nearest is {close[0]!r}" if close else ""


class Variant(NamedTuple):
    """One of the models that are compared."""

    name: str
    config_file: str | None  # None: that of --config-file
    overrides: list[str]


def parse_variant(text: str) -> Variant:
    """``name: [config.py] key=value ...``"""
    name, colon, rest = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 'name: overrides'")
    if set(name) & set("/\\=@"):
        raise argparse.ArgumentTypeError(f"{name!r} names a folder and rows: no / \\ = or @ in it")
    words = rest.split()
    config_file = words.pop(0) if words and words[0].endswith(".py") else None
    return Variant(name.strip(), config_file, words)


class ToolParser(argparse.ArgumentParser):
    """A parser that shows a tool's docstring as it is written."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


class ConfigToolParser(ToolParser):
    """With a config, or several, and overrides at the end, as in Detectron2's launcher.

    argparse would give an option that takes several values also the overrides that follow it.
    So all words of the form ``key=value`` at the end are overrides; a file of such a name is
    ``./key=value``, or something else follows it, if only ``--``.
    """

    def __init__(self, doc: str, several: bool = False, required: bool = True) -> None:
        super().__init__(doc)
        first = "; the first is what others are compared with" if several else ""
        self.add_argument(
            "--config-file",
            nargs="+" if several else None,
            required=required,
            metavar="FILE",
            help=f"path, also of this project's configs from its root{first}",
        )
        self.add_argument("opts", nargs="*", metavar="key=value", help="overrides of the config")

    def add_variants(self, required: bool) -> None:
        """``--variant``, to be given once for each."""
        self.add_argument(
            "--variant", type=parse_variant, action="append", default=[], required=required,
            metavar="'NAME: key=value ...'",
        )  # fmt: skip

    def add_device(self) -> None:
        self.add_argument("--device", help="default: the config's train.device")

    def parse_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        if "--" not in words:
            overrides = list(takewhile(OVERRIDE.match, reversed(words)))
            words.insert(len(words) - len(overrides), "--")
        args = super().parse_args(words, namespace)
        names = [variant.name for variant in getattr(args, "variant", [])]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            self.error(f"--variant: given more than once: {', '.join(repeated)}")
        return args


def read_config(path: str, overrides: list[str], device: str | None = None) -> DictConfig:
    """A config with overrides, with a device if one is named, and with the data set's number of
    classes if it has none."""
    with usage_errors(path):
        cfg = apply_overrides(load_config(path), overrides)
        if device:
            cfg.train.device = device
        decoder = OmegaConf.select(cfg, "model.decoder")
    if decoder is not None and decoder.get("num_classes", 0) is None:
        with usage_errors(f"{path}: model.decoder.num_classes is that of the data set"):
            datasets = [cfg.dataloader[part].get("dataset", {}) for part in ("train", "test")]
            decoder.num_classes = count_classes(*datasets)
    return cfg


def read_configs(
    paths: list[str], overrides: list[str], device: str | None = None
) -> dict[str, DictConfig]:
    """Configs by their files' names, numbered where these repeat."""
    configs = {}
    seen: Counter[str] = Counter()
    for path in paths:
        name = Path(path).stem
        seen[name] += 1
        label = name if seen[name] == 1 else f"{name} ({seen[name]})"
        configs[label] = read_config(path, overrides, device)
    return configs


def read_variants(
    variants: list[Variant], path: str, overrides: list[str], device: str | None = None
) -> dict[str, DictConfig]:
    """Configs by the names of variants, which are of the config ``path`` if they name none."""
    return {
        name: read_config(config_file or path, [*own, *overrides], device)
        for name, config_file, own in variants
    }


def build(cfg: DictConfig, key: str) -> Any:
    """What the config's node of that name describes."""
    node = OmegaConf.select(cfg, key)
    if node is None:
        raise UsageError(f"the config has no {key}")
    with usage_errors(f"the config's {key}"):
        return instantiate(node)


def evaluated_names(cfg: DictConfig) -> list[str]:
    """Names of the data sets that the config's evaluator scores, one by one."""
    names = OmegaConf.select(cfg, "dataloader.evaluator.dataset_name")
    return list(names) if OmegaConf.is_list(names) else [names]


def class_names(cfg: DictConfig) -> list[str]:
    """Names of the test set's classes, or their numbers where no data at hand tell them."""
    names = MetadataCatalog.get(evaluated_names(cfg)[0]).get("thing_classes")
    if not names and cfg.model.get("prompts"):
        names = [text if isinstance(text, str) else text[0] for text in cfg.model.prompts]
    return names or [str(number) for number in range(cfg.model.decoder.num_classes)]


def own_weights(cfg: DictConfig) -> str:
    """The folder that the config's model brings its weights from; "" if these are random."""
    return OmegaConf.select(cfg, "model.folder") or ""


def build_model(cfg: DictConfig) -> nn.Module:
    """The config's model on its device, with random weights or :func:`own_weights`."""
    model = build(cfg, "model")
    with usage_errors(f"device {cfg.train.device!r}"):
        return model.to(cfg.train.device)


def load_weights(model: nn.Module, path: str | Path, whole: bool = False) -> None:
    """:func:`load_upstream` from the file that ``--weights`` names."""
    with usage_errors("--weights"):
        check_weights(Path(path))
        load_upstream(model, path, whole=whole)


def check_weights(path: Path) -> None:
    """Raise an error that says what to do if a path is no file of weights, but much like one."""
    if path.is_dir():
        names = {file.name for file in path.glob("*.pth")}
        # Of a run's many checkpoints, these are what it was made for.
        listed = sorted(names & {"model_best.pth", "model_final.pth"}) or sorted(names)
        hint = f"; name one of its files: {', '.join(listed)}" if listed else " without checkpoints"
        raise IsADirectoryError(f"{path}: is a folder{hint}")
    if path.is_file():
        with open(path, "rb") as file:
            if WEB_PAGE.match(file.read(64)):
                raise ValueError(f"{path}: a web page, not weights; download the file itself")
    elif path.parent.is_dir():
        files = [file.name for file in path.parent.iterdir() if file.is_file()]
        if hint := nearest(path.name, files):
            raise FileNotFoundError(f"{path}: no such checkpoint{hint}")


def check_output(output: Path, inputs: Iterable[str | Path]) -> None:
    """Raise a :class:`UsageError` if a file written as ``output`` would replace what is read.

    Args:
        inputs: files, and folders of files, that the tool reads.
    """
    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder, not a file to write")
    place = output.resolve()
    for path in inputs:
        if Path(path).resolve() in (place, *place.parents):
            raise UsageError(f"--output {output}: would replace the input {path}")


def image_files(paths: list[Path]) -> list[dict]:
    """Dataset dicts of image files, patterns, and the images of folders in order of their names."""
    try:
        return [{"file_name": source} for source in find_sources(paths, IMAGES)]
    except DataError as error:
        raise UsageError(str(error)) from error


def read_images(dataset_dicts: Iterable[dict]) -> Iterator[tuple[dict, np.ndarray]]:
    """Dataset dicts with their images, (H, W, 3) RGB uint8.

    Those that cannot be read are left out, and counted and named in one warning.

    Raises:
        UsageError: if none can be read.
    """
    read, damaged = 0, []
    for dataset_dict in dataset_dicts:
        try:
            image = read_picture(dataset_dict).image
        except (OSError, ValueError) as error:
            damaged.append(in_one_line(error))
        else:
            read += 1
            yield dataset_dict, image
    if damaged:
        named = "; ".join(damaged[:NAMED]) + ("; ..." if len(damaged) > NAMED else "")
        if not read:
            raise UsageError(named)
        count = f"{len(damaged)} of {read + len(damaged)}"
        print(f"warning: left out {count} images: {named}", file=sys.stderr)


def image_size(cfg: DictConfig) -> tuple[int, int]:
    """(height, width) that the config's images are resized to."""
    size = OmegaConf.select(cfg, "dataloader.image_size")
    if not isinstance(size, ListConfig) or [type(side) for side in size] != [int, int]:
        raise UsageError(f"the config's dataloader.image_size is {size}, not [height, width]")
    return tuple(size)


def noise_image(height: int, width: int, seed: int) -> torch.Tensor:
    """(3, height, width) uint8 of numpy's noise, which stands for no real image."""
    noise = np.random.default_rng(seed).integers(256, size=(3, height, width), dtype=np.uint8)
    return torch.from_numpy(noise)


def describe_device(device: str) -> str:
    """The hardware that a time was measured on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    features = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({features}), {torch.get_num_threads()} threads"


def write_json(path: Path, content: dict | list, indent: int | None = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=indent).encode()))


def write_coco(path: Path, dataset: list[dict], classes: Sequence[str], root: str | Path) -> None:
    """Write dataset dicts as a COCO annotation file, and print how much it holds.

    Args:
        root: folder that its file names are relative to.
    """
    content = to_coco(dataset, classes, root)
    write_json(path, content, indent=None)
    print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} boxes")
