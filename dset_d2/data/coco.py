"""COCO-format annotation files as data sets that a config or a command line can name."""

from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances

from ..config import nearest


def coco_dataset(
    names: str | Sequence[str], json_file: str = "", image_root: str = ""
) -> list[dict]:
    """Load registered data sets, or a COCO annotation file that is registered under a name.

    Images without annotations are kept: an empty road teaches, too.

    Raises:
        ValueError: if the name is taken by other files, or if it is of no data set and a path is
            not set.
    """
    if json_file and image_root:
        files = {"json_file": json_file, "image_root": image_root}
        if names not in DatasetCatalog:
            register_coco_instances(names, {}, json_file, image_root)
        taken = {key: MetadataCatalog.get(names).get(key) for key in files}
        if taken != files:
            raise ValueError(f"data set {names!r} stands for {taken} already, not for {files}")
    elif json_file or image_root or (isinstance(names, str) and names not in DatasetCatalog):
        raise ValueError(
            f"data set {names!r}: set json_file and image_root, or names to a registered one's"
            f"{nearest(str(names), DatasetCatalog.list())}"
        )
    return get_detection_dataset_dicts(names, filter_empty=False)
