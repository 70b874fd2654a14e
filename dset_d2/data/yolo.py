"""Data sets in the folders that YOLO is trained on, as Ultralytics lays them out.

Images lie in ``images/train`` or ``train/images``, labels in folders of the same name with
``labels`` in the place of ``images``: a text file per image, a line per object, which is its class
and then, as shares of the image's sides, ``cx cy w h`` or the corners of a polygon ``x1 y1 x2 y2
x3 y3 ...``. An image without a file has no objects. ``data.yaml`` names the classes.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from detectron2.structures import BoxMode

from .coco import clip_box, log_counts
from .reading import DataError, upright_size

SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}  # names of folders
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
FAR = 2.0  # sides of the image: what lies beyond is no box that leaves it, but one in pixels


class Layout(NamedTuple):
    """What a YOLO data set consists of.

    ``file``: its data.yaml; ``classes``: their names in order; ``images``: the files of each split;
    ``keypoints``: whether lines go on behind ``cx cy w h``.
    """

    file: Path
    classes: list[str]
    images: dict[str, list[Path]]
    keypoints: bool


def read_layout(source: Path) -> Layout:
    """Find a data set's images.

    Args:
        source: its folder or its data.yaml.

    Raises:
        DataError: if anything is missing, naming it.
    """
    file = find_yaml(source)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected keys and values, found {type(content).__name__}")
    classes = read_names(content, file)
    images = {split: find_images(content, split, file) for split in SPLITS}
    if not any(label_path(image).is_file() for image in images["test"]):
        images["test"] = []  # those of many are published without labels
    images = {split: files for split, files in images.items() if files}
    if not images:
        raise DataError(f"{file}: no images in images/train or train/images beside it")
    return Layout(file, classes, images, "kpt_shape" in content)


def find_yaml(source: Path) -> Path:
    if not source.is_dir():
        return source
    files = sorted(path for path in source.iterdir() if path.suffix in (".yaml", ".yml"))
    named = [path for path in files if path.stem == "data"] or files
    if len(named) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise DataError(f"{source}: needs a data.yaml, found {found}; name one of another name")
    return named[0]


def read_names(content: dict, file: Path) -> list[str]:
    """The classes' names, which are a list, or a dict by number."""
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            numbers = ", ".join(map(str, names))
            raise DataError(f"{file}: the keys of 'names' are {numbers}, not 0, 1, 2 and so on")
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file}: 'names' has to list the names of the classes, or number them")
    for name in names:
        if not isinstance(name, str | int | float):
            raise DataError(f"{file}: 'names' holds a {type(name).__name__}, which is no name")
    if content.get("nc", len(names)) != len(names):
        raise DataError(f"{file}: 'nc' is {content['nc']!r}, but 'names' has {len(names)}")
    return [str(name) for name in names]


def find_images(content: dict, split: str, file: Path) -> list[Path]:
    """A split's images in order of their names; none if there is no such split."""
    folders = content.get(split)
    given = bool(folders)
    folders = folders if isinstance(folders, list) else [folders]
    if not given:
        folders = [f for name in SPLITS[split] for f in (f"images/{name}", f"{name}/images")]
    elif not all(isinstance(folder, str) for folder in folders):
        raise DataError(f"{file}: {split!r} is {content[split]!r}, not a folder")
    images = []
    for folder in folders:
        # Exports write ../train/images and mean the folder that data.yaml lies in.
        inside = folder.removeprefix("../")
        tops = [file.parent / str(content.get("path") or ""), file.parent]
        places = dict.fromkeys(top / name for top in tops for name in (folder, inside))
        place = next((place for place in places if place.is_dir()), None)
        if place is not None:
            images += sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif given and split != "test":  # which many name and few have
            tried = ", ".join(map(str, places))
            raise DataError(
                f"{file}: {split!r} is {folder!r}, which is none of the folders {tried}"
            )
    return images


def label_path(image: Path) -> Path:
    """Where an image's labels are: the last ``images`` of its path is ``labels`` there."""
    parts = list(image.with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts)


def load_yolo(layout: Layout, split: str) -> list[dict]:
    """Read a split as dataset dicts, whose sizes are those of the images upright.

    Images without a label file are counted in a warning, as are clipped and dropped boxes.

    Raises:
        DataError: on a malformed line, naming file and line, or if no image has a label file.
    """
    counts: Counter[str] = Counter()
    dataset = []
    for index, image in enumerate(layout.images[split]):
        size = upright_size(image)
        labels = label_path(image)
        annotations = []
        if labels.is_file():
            annotations = read_labels(labels, size, len(layout.classes), layout.keypoints, counts)
        else:
            counts["without a label file"] += 1
        dataset.append(
            {
                "file_name": str(image),
                "image_id": index + 1,
                "height": size[0],
                "width": size[1],
                "annotations": annotations,
            }
        )
    if counts["without a label file"] == len(dataset):
        image = layout.images[split][0]
        raise DataError(
            f"{layout.file}: no image of {split!r} has labels; for {image} there is no "
            f"{label_path(image)}"
        )
    log_counts(f"{layout.file} {split}: {len(dataset)} images", counts)
    return dataset


def read_labels(
    path: Path, size: tuple[int, int], num_classes: int, keypoints: bool, counts: Counter
) -> list[dict]:
    """Detectron2 annotations of one label file.

    Args:
        size: (height, width) of the image.
        counts: gets ``clipped`` and ``dropped`` boxes added.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as text: {error}") from None
    annotations = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        label, box = read_line(line.split(), where, keypoints)
        if label not in range(num_classes):
            raise DataError(f"{where}: class {label:g} is not one of 0 to {num_classes - 1}")
        box = [share * side for share, side in zip(box, (size[1], size[0]) * 2)]
        box = clip_box(box, size, counts)
        if box is not None:
            mode = BoxMode.XYXY_ABS
            objects = {"bbox": box, "bbox_mode": mode, "category_id": int(label), "iscrowd": 0}
            annotations.append(objects)
    return annotations


def read_line(words: Sequence[str], where: str, keypoints: bool) -> tuple[float, list[float]]:
    """A line's class, and its box x1 y1 x2 y2 as shares of the image's sides."""
    try:
        label, *values = map(float, words)
    except ValueError:
        raise DataError(f"{where}: {' '.join(words)[:80]!r} is not a line of numbers") from None
    if not all(map(math.isfinite, (label, *values))):
        raise DataError(f"{where}: {' '.join(words)[:80]!r} is not finite")
    if keypoints:
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise DataError(
            f"{where}: {len(values)} numbers behind the class; there are 4, cx cy w h, or a "
            f"polygon's pairs x y"
        )
    if max(map(abs, values)) > FAR:
        raise DataError(f"{where}: {max(values, key=abs):g} is no share of the image's sides")
    if len(values) > 4:
        x, y = values[::2], values[1::2]
        return label, [min(x), min(y), max(x), max(y)]
    cx, cy, w, h = values
    if w < 0 or h < 0:
        raise DataError(f"{where}: width {w:g} and height {h:g} must not be negative")
    return label, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
