"""DAIR-V2X (https://arxiv.org/abs/2204.05575) as Detectron2 data sets.

Registers, by the official layouts under ``$DETECTRON2_DATASETS/dair-v2x``:

=============================  ======================================  ======================
data set                       folder                                  split file
=============================  ======================================  ======================
``dair_v2x_i_{split}``         single-infrastructure-side              single-infrastructure
``dair_v2x_v_{split}``         single-vehicle-side                     single-vehicle
``dair_v2x_c_i_{split}``       cooperative-vehicle-infrastructure/     cooperative
                               infrastructure-side
``dair_v2x_c_v_{split}``       cooperative-vehicle-infrastructure/     cooperative
                               vehicle-side
=============================  ======================================  ======================

Split files are ``split_datas/<name>-split-data.json``, as in the official repository. Nothing is
read before a data set is used. Each is also registered with ten classes as ``..._10cls``.

:func:`dair_v2x_dataset` reads them from any other folder, also sides of images and labels alone
(``vehicle-side/{image,label}/000001.*``).
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.structures import BoxMode

from ..config import nearest
from .coco import clip_box, log_counts
from .reading import DataError, image_size, read_json

CLASSES_8 = (
    "Car",
    "Truck",
    "Van",
    "Bus",
    "Pedestrian",
    "Cyclist",
    "Motorcyclist",
    "Trafficcone",
)
CLASSES_10 = CLASSES_8 + ("Tricyclist", "Barrowlist")

# Spellings are compared in lower case without underscores.
SYNONYMS = {"barrow": "barrowlist"}
MERGED_8 = {"tricyclist": "cyclist", "barrowlist": "cyclist"}

# What an ignore type may hide: a region for each of these classes, in evaluation only.
VEHICLES = ("Car", "Truck", "Van", "Bus")
IGNORED = {
    "pedestrianignore": ("Pedestrian",),
    "carignore": VEHICLES,
    "otherignore": None,  # any class
    "unknownmovable": None,
    "unknownunmovable": None,
}

# name: (folder, split file, keys of the split inside of that file)
SIDES = {
    "i": ("single-infrastructure-side", "single-infrastructure", ()),
    "v": ("single-vehicle-side", "single-vehicle", ()),
    "c_i": (
        "cooperative-vehicle-infrastructure/infrastructure-side",
        "cooperative",
        ("infrastructure_split",),
    ),
    "c_v": (
        "cooperative-vehicle-infrastructure/vehicle-side",
        "cooperative",
        ("vehicle_split",),
    ),
}
SPLITS = ("train", "val", "test")


def number(entry: dict, key: str, where: str) -> float:
    """A finite number that may be written as a string."""
    try:
        value = float(entry[key])
    except KeyError:
        raise DataError(f"{where}: no field {key!r}") from None
    except (TypeError, ValueError):
        raise DataError(f"{where}: field {key!r} is {entry[key]!r}, not a number") from None
    if not math.isfinite(value):
        raise DataError(f"{where}: field {key!r} is {entry[key]!r}, not finite")
    return value


def state(entry: dict, key: str, where: str) -> int:
    """An occlusion or truncation state, 0 (none) to 2; 0 where it is absent."""
    if key not in entry:
        return 0
    value = number(entry, key, where)
    if value not in (0, 1, 2):
        raise DataError(f"{where}: field {key!r} is {entry[key]!r}, not 0, 1 or 2")
    return int(value)


def class_map(classes: tuple[str, ...]) -> dict[str, int]:
    """Contiguous id of every known spelling, in lower case without underscores."""
    ids = {name.lower(): index for index, name in enumerate(classes)}
    for merged, target in MERGED_8.items():
        ids.setdefault(merged, ids[target])
    for spelling, name in SYNONYMS.items():
        ids[spelling] = ids[name]
    return ids


def read_label(
    path: Path, size: tuple[int, int], classes: tuple[str, ...], counts: Counter
) -> list[dict]:
    """Annotations of one label file.

    Args:
        size: (height, width) of the image that boxes are clipped to.
        counts: gets ``clipped``, ``dropped`` and ``ignored`` boxes added.

    Returns:
        Detectron2 annotations with ``occluded_state`` and ``truncated_state``; ignore types are
        ``iscrowd`` regions, one for each class that they may stand for.

    Raises:
        DataError: on a malformed file or an unknown type, naming the entry.
    """
    ids = class_map(classes)
    annotations = []
    for index, entry in enumerate(read_json(path, list)):
        where = f"{path}: entry {index}"
        if not isinstance(entry, dict) or not isinstance(entry.get("2d_box"), dict):
            raise DataError(f"{where}: no object with a '2d_box'")
        kind = str(entry.get("type", "")).lower().replace("_", "")
        if kind in IGNORED:
            hidden = IGNORED[kind] or classes
            categories = [ids[name.lower()] for name in hidden]
        elif kind in ids:
            categories = [ids[kind]]
        else:
            raise DataError(f"{where}: unknown type {entry.get('type')!r}")
        box = clip_box(read_box(entry["2d_box"], where), size, counts)
        if box is None:
            continue
        counts["ignored"] += kind in IGNORED
        common = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": int(kind in IGNORED)}
        if kind not in IGNORED:
            for key in ("occluded_state", "truncated_state"):
                common[key] = state(entry, key, where)
        annotations += [common | {"category_id": category} for category in categories]
    return annotations


def read_box(entry: dict, where: str) -> list[float]:
    return [number(entry, key, where) for key in ("xmin", "ymin", "xmax", "ymax")]


def read_split(path: Path, keys: tuple[str, ...], split: str) -> set[str]:
    """Image numbers of a split, unpadded; cooperative files nest one split per side."""
    content = read_json(path, dict)
    for key in (*keys, split):
        if not isinstance(content, dict) or key not in content:
            raise DataError(f"{path}: no key {key!r}")
        content = content[key]
    if not isinstance(content, list):
        raise DataError(f"{path}: {split!r} is not a list")
    return {unpadded(stem) for stem in content}


def unpadded(stem: str | int) -> str:
    """What 17, "17" and "000017" have in common."""
    return str(stem).lstrip("0") or "0"


def side_entries(side: Path, roots: list[Path]) -> tuple[Path, list]:
    """A side's entries, and where they are from: its ``data_info.json``, or else its images."""
    info = side / "data_info.json"
    if info.is_file():
        return info, read_json(info, list)
    for folder in (place for root in roots for place in (root / "image", root)):
        names = sorted(path.name for path in folder.glob("*") if path.suffix in (".jpg", ".png"))
        if names:
            return folder, [{"image_path": f"image/{name}"} for name in names]
    raise DataError(f"{side}: neither data_info.json nor images in any of {listed(roots)}")


def listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))


def wanted_entries(source: Path, entries: list, wanted: set[str]) -> Iterator[tuple[str, dict]]:
    """The entries of a split's images, each once, after what names them in messages."""
    seen = {}
    for index, entry in enumerate(entries):
        where = f"{source}: entry {index}"
        relative = path_in(entry, "image_path", where) if isinstance(entry, dict) else ""
        if not relative:
            raise DataError(f"{where}: no 'image_path'")
        stem = Path(relative).stem
        number = unpadded(stem)
        if number not in wanted:
            continue
        if not stem.isdecimal():
            raise DataError(f"{where}: image name {stem!r} is not a number")
        if number not in seen:
            seen[number] = relative
            yield where, entry
        elif seen[number] != relative:
            raise DataError(f"{where}: {relative} has the number of {seen[number]}")


def path_in(entry: dict, key: str, where: str) -> str:
    """A path that an entry gives relative to its side; "" if it has none."""
    path = entry.get(key) or ""
    if not isinstance(path, str):
        raise DataError(f"{where}: {key!r} is {path!r}, not a path")
    if os.path.isabs(path) or Path(os.path.normpath(path)).parts[:1] == (os.pardir,):
        raise DataError(f"{where}: {key!r} is {path!r}, which leaves the side's folder")
    return path


def label_paths(root: Path, entry: dict, stem: str, where: str) -> list[Path]:
    """Where the camera labels may be; the official code and its README name the key differently."""
    named = [path_in(entry, key, where) for key in ("label_camera_std_path", "label_camera_path")]
    usual = [f"label/camera/{stem}.json", f"label/{stem}.json"]
    return [root / path for path in (*named, *usual) if path]


def side_folders(root: Path) -> list[Path]:
    """Where a side may be: many unpack an archive into one more folder of its name."""
    top = root.parent
    return [root, root / root.name, top / top.name / root.name]


def unpacked_side(root: Path) -> Path | None:
    places = [
        folder / name for name in ("data_info.json", "label") for folder in side_folders(root)
    ]
    return next((place.parent for place in places if place.exists()), None)


def no_side(places: list[Path]) -> DataError:
    return DataError(
        f"no data_info.json or label in any of {listed(places)}; set DETECTRON2_DATASETS to where "
        f"dair-v2x is, or the data set's root to its folder"
    )


def image_roots(root: Path) -> list[Path]:
    """Folders that ``image/...`` may be relative to: some zips unpack beside or in their side."""
    sides = side_folders(root)
    names = (f"{root.name}-image", f"{root.parent.name}-{root.name}-image")
    beside = [folder / name for folder in (*sides, *root.parents[:2]) for name in names]
    return sides + beside + [folder / folder.name for folder in beside]


def find_image(roots: list[Path], relative: str) -> Path | None:
    """The image in one of the roots, as the entry has it or, in a sibling folder, flat.

    The suffix may be another: some convert the images, and not the entries.
    """
    for root in roots:
        for name in (relative, Path(relative).name):
            for suffix in (Path(relative).suffix, ".jpg", ".png"):
                path = (root / name).with_suffix(suffix)
                if path.is_file():
                    return path
    return None


def load_dair_v2x(
    root: str | Path,
    split_file: str | Path,
    split: str,
    split_keys: tuple[str, ...] = (),
    classes: tuple[str, ...] = CLASSES_8,
    image_root: str | Path | None = None,
) -> list[dict]:
    """Read one side of DAIR-V2X as dataset dicts.

    Images of the split that are not on disk, among them the unreleased test images, are left out
    and counted in one warning, as are clipped and dropped boxes.

    Args:
        root: a side's folder, with ``data_info.json`` or, without one, ``image`` and ``label``.
        split_file: the official split file.
        split: "train", "val" or "test".
        split_keys: where the split lies inside of the file.
        classes: :data:`CLASSES_8` or :data:`CLASSES_10`.
        image_root: folder that the entries' ``image/...`` is relative to, if not ``root``.

    Raises:
        DataError: on a missing or malformed file, naming the file and the entry.
    """
    root, split_file = Path(root), Path(split_file)
    side = unpacked_side(root)
    if side is None:
        raise no_side([root])
    wanted = read_split(split_file, split_keys, split)
    places = [Path(image_root)] if image_root else image_roots(root)
    roots = [place for place in places if place.is_dir()]
    counts = Counter({"missing images": len(wanted)})
    absent = ""
    dataset = []
    for where, entry in wanted_entries(*side_entries(side, roots), wanted):
        relative = entry["image_path"]
        stem = Path(relative).stem
        image = find_image(roots, relative)
        if image is None:
            absent = absent or f"; no {relative} in any of {listed(places)}"
            continue
        counts["missing images"] -= 1
        paths = label_paths(side, entry, stem, where)
        labels = next((path for path in paths if path.is_file()), None)
        if labels is None and split != "test":
            counts["missing labels"] += 1
            absent = absent or f"; there is no {paths[0]}"
            continue
        size = image_size(image)
        annotations = read_label(labels, size, classes, counts) if labels else []
        dataset.append(
            {
                "file_name": str(image),
                "image_id": int(stem),
                "height": size[0],
                "width": size[1],
                "annotations": annotations,
            }
        )
    summary = log_counts(f"{root} {split}: {len(dataset)} images", counts)
    if not dataset:
        raise DataError(
            f"{root}: nothing of split {split!r} of {split_file} is usable: {summary}{absent}"
        )
    return dataset


def load_registered(
    side: str, split: str, classes: tuple[str, ...], root: str = "", split_file: str = ""
) -> list[dict]:
    """Load from ``root``, or from where ``$DETECTRON2_DATASETS`` points now.

    Args:
        root: folder of the data set, in the official layout or with ``infrastructure-side`` and
            ``vehicle-side`` in it, the folder above it, or that of the side.
        split_file: by default it is looked for beside the sides and in ``split_datas``.
    """
    home = Path(root or os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    folder, split_name, keys = SIDES[side]
    bases = [home / "dair-v2x", home]  # many set it to dair-v2x itself
    short = Path(folder).name.removeprefix("single-")
    others = [base / short for base in bases] + ([home] if root else [])
    places = [base / folder for base in bases] + [p for p in others if may_be(p, side)]
    place = next((place for place in places if unpacked_side(place)), None)
    if place is None:
        raise no_side(places)
    if not split_file:
        name = f"{split_name}-split-data.json"
        above = dict.fromkeys((*bases, *place.parents[:2]))
        files = [base / folder / name for base in above for folder in ("split_datas", "")]
        split_file = next((str(file) for file in files if file.is_file()), "")
        if not split_file:
            raise DataError(f"{place}: none of {listed(files)} is there; set split_file to it")
    return load_dair_v2x(place, split_file, split, keys, classes)


def may_be(folder: Path, side: str) -> bool:
    """Whether a folder's name allows that side; the ids of one are other images in another."""
    folder = folder.resolve()
    other = "vehicle" if side.endswith("i") else "infrastructure"
    cooperative = folder.parent.name.startswith("cooperative")
    return other not in folder.name and (not cooperative or side.startswith("c_"))


def dair_v2x_dataset(
    names: str | Sequence[str], root: str = "", split_file: str = ""
) -> list[dict]:
    """Load registered data sets; those of DAIR-V2X from a folder of your choice.

    Until the next call their names stand for what is there, also for evaluators.

    Args:
        names: such as "dair_v2x_c_v_train", which tells the side and the split.
        root, split_file: see :func:`load_registered`.

    Raises:
        DataError: if a folder or file is given for a name that is none of DAIR-V2X.
    """
    for name in [names] if isinstance(names, str) else names:
        if name in REGISTERED:
            DatasetCatalog[name] = partial(REGISTERED[name], root=root, split_file=split_file)
        elif root or split_file:
            close = nearest(name, REGISTERED)
            raise DataError(f"root={root!r}: {name!r} is no data set of DAIR-V2X{close}")
    return get_detection_dataset_dicts(names, filter_empty=False)


REGISTERED = {
    f"dair_v2x_{side}_{split}{suffix}": partial(load_registered, side, split, classes)
    for side in SIDES
    for split in SPLITS
    for classes, suffix in ((CLASSES_8, ""), (CLASSES_10, "_10cls"))
}


def register_all() -> None:
    for name, load in REGISTERED.items():
        DatasetCatalog.register(name, load)
        classes = list(load.args[-1])
        MetadataCatalog.get(name).set(thing_classes=classes, evaluator_type="coco")


register_all()
