"""What would end a run, or spoil it, hours after its start is looked for before its first step."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch.utils.data import Dataset
from tqdm import tqdm

from ..config import nearest
from .reading import DataError, UnreadableImage, check_header, read_json

logger = logging.getLogger(__name__)

LOADERS = ("get_detection_dataset_dicts", "coco_dataset", "dair_v2x_dataset")
EVALUATED = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")  # by pycocotools


def dataset_names(node: Mapping) -> list[str]:
    """Names of the data sets that a config's ``dataset`` loads, or what is inside of its Mosaic.

    There are none if it loads something else than registered data sets.
    """
    node = innermost(node)
    if target_name(node) not in LOADERS:
        return []
    names = node["names"]
    if not names:
        raise DataError(f"names={names}: names no data set")
    return [names] if isinstance(names, str) else list(names)


def innermost(node: Mapping) -> Mapping:
    """The node of the data set itself, without what composes its images."""
    while "dataset" in node:
        node = node["dataset"]
    return node


def target_name(node: Mapping) -> str:
    """The name of what a config's node makes, without its module."""
    target = node.get("_target_", "")
    return getattr(target, "__name__", str(target)).rpartition(".")[2]


def check_datasets(train: str | Sequence[str], test: str, num_classes: int | None = None) -> None:
    """Raise a :class:`DataError` if the data sets do not fit together or cannot be evaluated.

    Labels are numbers, so all data sets must have the same categories in the same order.

    Args:
        train: names of the training data sets.
        test: name of the one that the evaluator scores.
        num_classes: of the model.
    """
    train = [train] if isinstance(train, str) else list(train)
    if not isinstance(test, str):
        raise DataError(f"test data set {test}: an evaluator scores one, named without brackets")
    classes = categories(test)
    for name in train:
        for index, pair in enumerate(zip_longest(categories(name), classes)):
            if pair[0] != pair[1]:
                raise DataError(
                    f"data sets {name!r} and {test!r} must have the same categories in one order; "
                    f"number {index} is {pair[0]!r} and {pair[1]!r}"
                )
    if num_classes not in (None, len(classes)):
        raise DataError(
            f"the model's num_classes={num_classes}, but {test!r} has {len(classes)} categories"
        )
    metadata = MetadataCatalog.get(test)
    if metadata.get("evaluator_type") == "coco" and metadata.get("json_file"):
        check_coco_file(metadata.json_file)


def categories(name: str) -> list[str]:
    """A data set's categories; loads it if these are not known before."""
    if name not in DatasetCatalog:
        raise DataError(f"no data set is named {name!r}{nearest(name, DatasetCatalog.list())}")
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)
    if not metadata.get("thing_classes"):
        raise DataError(f"data set {name!r} has no categories: its metadata lack thing_classes")
    return list(metadata.thing_classes)


def count_classes(*datasets: Mapping) -> int:
    """The number of categories of the first of a config's ``dataset`` nodes that names data.

    Raises:
        ValueError: if none does, or if it cannot be read; says why.
    """
    node = next(filter(names_data, datasets), datasets[0])
    names = dataset_names(node)
    if not names:
        raise DataError(f"{target_name(node)!r} does not tell its categories")
    files = {key: node.get(key) for key in ("json_file", "image_root")}
    known = MetadataCatalog.get(names[0]).get("files") == files
    if not known and (node.get("json_file") or not names_data(node)):
        instantiate(node)  # registers the file's categories, or says what is missing
    return len(categories(names[0]))


def names_data(node: Mapping) -> bool:
    """Whether a config's ``dataset`` names a file, or a data set that is registered."""
    names = dataset_names(node)
    return bool(names) and (bool(node.get("json_file")) or names[0] in DatasetCatalog)


def check_coco_file(path: str) -> None:
    """Raise a :class:`DataError` if COCO's metrics cannot be computed from an annotation file."""
    for index, annotation in enumerate(read_json(path, dict).get("annotations", [])):
        for key in EVALUATED:
            if key not in annotation:
                raise DataError(f"{path}: annotation {index} has no {key!r}, needed in evaluation")
        if annotation["id"] == 0:
            raise DataError(f"{path}: annotation {index} has id 0, which evaluation takes for none")


def check_images(dataset: Sequence[dict] | Dataset, skip_unreadable: bool = False) -> int:
    """Look at the headers of all image files, and log how many there are.

    Args:
        dataset: dataset dicts, also inside of Mosaic.
        skip_unreadable: missing and damaged files are a warning.

    Returns:
        How many are sound.

    Raises:
        DataError: says how many are not, and what is wrong with the first ones.
    """
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    sizes = {}
    count = len(dataset)  # type: ignore[arg-type]  # a Dataset declares no length
    for dataset_dict in (dataset[index] for index in range(count)):
        size = dataset_dict.get("height"), dataset_dict.get("width")
        sizes[dataset_dict["file_name"]] = None if None in size else size
    with ThreadPoolExecutor(8) as pool:  # files on a network are waited for
        results = pool.map(fault, sizes, sizes.values())
        # The bar comes if it takes more than three seconds, and where somebody can see it.
        results = tqdm(results, "image files", len(sizes), delay=3, disable=None)
        faults = [error for error in results if error is not None]
    some = "; ".join(map(str, faults[:5]))
    summary = f"{len(faults)} of {len(sizes)} image files are bad: {some}"
    passed = (FileNotFoundError, UnreadableImage) if skip_unreadable else ()
    if len(faults) == len(sizes) or not all(isinstance(error, passed) for error in faults):
        raise DataError(summary)
    if faults:
        logger.warning("%s", summary)
    logger.info("Checked the headers of %d image files", len(sizes))
    return len(sizes) - len(faults)


def fault(path: str, size: tuple[int, int] | None) -> Exception | None:
    try:
        check_header(path, size)
    except (OSError, DataError) as error:
        return error
    return None
