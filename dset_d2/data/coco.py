"""COCO-format annotation files as data sets that a config or a command line can name."""

from collections.abc import Sequence
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json

from ..config import nearest
from .reading import DataError


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
