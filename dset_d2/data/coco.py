"""COCO-format annotation files as data sets that a config or a command line can name."""

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances


def coco_dataset(name: str, json_file: str, image_root: str) -> list[dict]:
    """Register a COCO annotation file under ``name`` and load it.

    Images without annotations are kept: an empty road teaches, too.

    Raises:
        ValueError: if ``name`` is taken by other files, or a path is not set.
    """
    if not json_file or not image_root:
        raise ValueError(f"data set {name!r}: set json_file and image_root")
    files = {"json_file": json_file, "image_root": image_root}
    if name not in DatasetCatalog:
        register_coco_instances(name, {}, json_file, image_root)
    taken = {key: MetadataCatalog.get(name).get(key) for key in files}
    if taken != files:
        raise ValueError(f"data set {name!r} stands for {taken} already, not for {files}")
    return get_detection_dataset_dicts(name, filter_empty=False)
