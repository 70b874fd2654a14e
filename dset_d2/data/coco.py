"""COCO-format annotation files as data sets that a config or a command line can name."""

from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json

from .reading import DataError


def coco_dataset(name: str, json_file: str, image_root: str) -> list[dict]:
    """Register a COCO annotation file under ``name`` and load it; without paths, load what is
    registered under that name.

    Images without annotations are kept: an empty road teaches, too. Where annotations lack what
    COCO's metrics need (``area``, ``iscrowd``, an ``id`` other than 0), the evaluator completes a
    copy in its output folder: nothing is a crowd, and areas are those of masks, else of boxes.

    Raises:
        ValueError: if ``name`` is taken by other files, a path is not set, or the file is no COCO
            file; names it.
    """
    if name in DatasetCatalog and not (json_file or image_root):
        return get_detection_dataset_dicts(name, filter_empty=False)
    if not json_file or not image_root:
        raise ValueError(f"data set {name!r}: set json_file and image_root")
    files = {"json_file": json_file, "image_root": image_root}
    metadata = MetadataCatalog.get(name)
    if name not in DatasetCatalog:
        loader = partial(load_coco_json, json_file, image_root, name, ["area", "id"])
        DatasetCatalog.register(name, loader)
        metadata.set(**files, files=files, evaluator_type="coco")
    if metadata.get("files") != files:
        taken = metadata.get("files", "another data set")
        raise ValueError(f"data set {name!r} stands for {taken} already, not for {files}")
    try:
        dataset = get_detection_dataset_dicts(name, filter_empty=False)
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
