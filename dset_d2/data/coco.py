"""COCO-format annotation files as data sets that a config or a command line can name; and what
other formats share on their way to them."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json

from ..config import nearest
from .reading import DataError

logger = logging.getLogger(__name__)


def coco_dataset(
    names: str | Sequence[str], json_file: str = "", image_root: str = ""
) -> list[dict]:
    """Load registered data sets, or a COCO annotation file that is registered under a name.

    Images without annotations are kept: an empty road teaches, too. Where annotations lack what
    COCO's metrics need (``area``, ``iscrowd``, an ``id`` other than 0), the evaluator completes a
    copy in its output folder: nothing is a crowd, and areas are those of masks, else of boxes.

    Raises:
        ValueError: if the name is taken by other files, if it is of no data set and a path is not
            set, or if the file is no COCO file; names it.
    """
    if not (json_file or image_root) and (not isinstance(names, str) or names in DatasetCatalog):
        return get_detection_dataset_dicts(names, filter_empty=False)
    if not json_file or not image_root:
        raise ValueError(
            f"data set {names!r}: set json_file and image_root, or names to a registered one's"
            f"{nearest(str(names), DatasetCatalog.list())}"
        )
    files = {"json_file": json_file, "image_root": image_root}
    metadata = MetadataCatalog.get(names)
    if names not in DatasetCatalog:
        loader = partial(load_coco_json, json_file, image_root, names, ["area", "id"])
        DatasetCatalog.register(names, loader)
        metadata.set(**files, files=files, evaluator_type="coco")
    if metadata.get("files") != files:
        taken = metadata.get("files", "another data set")
        raise ValueError(f"data set {names!r} stands for {taken} already, not for {files}")
    try:
        dataset = get_detection_dataset_dicts(names, filter_empty=False)
    except OSError:
        raise
    except Exception as error:  # Detectron2 and pycocotools take the file for a right one
        cause = f"{type(error).__name__}: {error}"
        cause = "no categories" if metadata.get("thing_classes") == [] else cause
        raise DataError(f"{json_file}: not a COCO file of detections: {cause}") from error
    annotations = (a for dataset_dict in dataset for a in dataset_dict["annotations"])
    complete = all("area" in a and "iscrowd" in a and a.get("id") != 0 for a in annotations)
    if not complete and metadata.get("json_file") == json_file:
        del metadata.json_file  # COCOEvaluator then writes a file of its own from the dataset dicts
    return dataset


def clip_box(box: list[float], size: tuple[int, int], counts: Counter) -> list[float] | None:
    """The box x1 y1 x2 y2 inside of an image, or None if less than a pixel's side is left.

    Args:
        size: (height, width) of the image.
        counts: gets ``clipped`` and ``dropped`` boxes added.
    """
    height, width = size
    clipped = [min(max(v, 0.0), limit) for v, limit in zip(box, (width, height) * 2)]
    if clipped[2] - clipped[0] < 1 or clipped[3] - clipped[1] < 1:
        counts["dropped"] += 1
        return None
    # Less is rounding.
    counts["clipped"] += any(abs(new - old) > 0.5 for new, old in zip(clipped, box))
    return clipped


def log_counts(what: str, counts: Counter) -> str:
    """Log what was met in reading a data set, as a warning if it is unusual; returns it."""
    summary = ", ".join(f"{value} {key}" for key, value in sorted(counts.items()) if value)
    unusual = {key for key, value in counts.items() if value} - {"ignored"}
    log = logger.warning if unusual else logger.info
    log("%s; %s", what, summary or "nothing unusual")
    return summary


def to_coco(dataset: list[dict], classes: Sequence[str], root: str | Path) -> dict:
    """COCO annotation content of dataset dicts; ids follow from the dicts' order alone.

    Category ids start at 1, in the order of ``classes``; file names are relative to ``root``.
    """
    images: list[dict] = []
    annotations: list[dict] = []
    for dataset_dict in dataset:
        file_name = os.path.relpath(dataset_dict["file_name"], root)
        size = {key: dataset_dict[key] for key in ("height", "width")}
        images.append({"id": dataset_dict["image_id"], "file_name": file_name, **size})
        for annotation in dataset_dict["annotations"]:
            x, y, x2, y2 = annotation["bbox"]
            states = {k: v for k, v in annotation.items() if k.endswith("_state")}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": dataset_dict["image_id"],
                    "category_id": annotation["category_id"] + 1,
                    "bbox": [x, y, x2 - x, y2 - y],
                    "area": (x2 - x) * (y2 - y),
                    "iscrowd": annotation["iscrowd"],
                    **states,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}
