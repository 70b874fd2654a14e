"""What a run reads, when its schedules are due and how it is evaluated: built and checked before
its first step."""

import copy
import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.utils.data import Dataset

from ..config import nearest
from ..data.checks import check_datasets, check_images, dataset_names, innermost, target_name
from ..engine.console import evaluation_lines, printed_to_log
from ..engine.hooks import no_metric
from ..engine.trainer import check_parts
from .common import UsageError, build, evaluated_names, usage_errors

logger = logging.getLogger(__name__)

# Settings of schedules that must lie within a run, or it never gets to what they lead to.
ENDS = ("warmup_iters", "start_step", "end_step", "unfreeze_step")
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def some(dataset: Sequence | Dataset, few: int | None) -> Sequence | Dataset:
    """So many items of a data set, evenly spaced; None for all."""
    if few is None or not hasattr(dataset, "__len__") or len(dataset) <= few:
        return dataset
    return [dataset[i * len(dataset) // few] for i in range(few)]


def load_training_set(cfg: DictConfig) -> Sequence | Dataset | None:
    """The training set, without what composes its images; None if it is an outside package's."""
    node = cfg.dataloader.train
    if "dataset" not in node:
        return None
    with usage_errors("the config's dataloader.train"):
        return instantiate(innermost(node))


def with_loaded(node: DictConfig, dataset: Sequence | Dataset) -> dict | Sequence | Dataset:
    """A config's node of a data set, with the innermost one loaded."""
    if "dataset" in node:
        return {**node, "dataset": with_loaded(node["dataset"], dataset)}
    return dataset


def fit_schedules(cfg: DictConfig, dataset: Sequence | Dataset | None) -> None:
    """Let schedules, and the learning rate if it is to, follow the data set and the batch."""
    if hasattr(dataset, "__len__"):
        cfg.train.images = len(dataset)
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    if cfg.train.lr_batch_size and batch:
        cfg.optimizer.lr *= batch / cfg.train.lr_batch_size
        cfg.train.lr_batch_size = batch  # so that a saved config is not scaled again
    logger.info(
        "%d images in batches of %s, %d steps, learning rate %g",
        *(cfg.train.images, batch, cfg.train.max_iter, cfg.optimizer.lr),
    )
    if batch:
        with usage_errors("train.accumulate"):
            check_parts(batch // comm.get_world_size(), cfg.train.accumulate)
    if late := outlasting(cfg, cfg.train.max_iter):
        logger.warning("The run ends before its schedules: %s", ", ".join(late))


def outlasting(node: DictConfig | ListConfig, steps: int, prefix: str = "") -> list[str]:
    """What a config has to happen after so many steps."""
    found = []
    for key, value in node.items() if isinstance(node, DictConfig) else enumerate(node):
        if isinstance(value, DictConfig | ListConfig):
            found += outlasting(value, steps, f"{prefix}{key}.")
        elif key in ENDS and value is not None and value > steps:
            found.append(f"{prefix}{key}={value}")
    return found


def build_loader(
    cfg: DictConfig,
    part: str,
    dataset: Sequence | Dataset | None = None,
    few: int | None = None,
) -> Iterable:
    """The config's loader for training or test, once its data set's image files were looked at.

    Args:
        dataset: of it, if it is loaded already.
        few: how many images of it to use, if not all.
    """
    node = cfg.dataloader[part]
    with usage_errors(f"the config's dataloader.{part}"):
        if dataset is not None:
            node = {**node, "dataset": with_loaded(node.dataset, dataset)}
        if "dataset" not in node or target_name(node.get("mapper", {})) != "DETRMapper":
            return instantiate(node)  # an outside package's, which may read anything
        dataset = some(instantiate(node["dataset"]), few)
        if comm.is_main_process() and hasattr(dataset, "__len__"):
            check_images(dataset, node["mapper"].get("skip_unreadable", False))
        return instantiate({**node, "dataset": dataset})


def single_tests(cfg: DictConfig) -> dict[str, DictConfig]:
    """The config for each of its test sets, by name, as if there were no other."""
    names = evaluated_names(cfg)
    if not OmegaConf.is_list(OmegaConf.select(cfg, "dataloader.evaluator.dataset_name")):
        return {names[0]: cfg}
    singles = {}
    for name in names:
        singles[name] = single = copy.deepcopy(cfg)
        evaluator = single.dataloader.evaluator
        single.dataloader.test.dataset.names = evaluator.dataset_name = name
        if len(names) > 1 and evaluator.get("output_dir"):
            evaluator.output_dir = f"{evaluator.output_dir}/{name}"
    return singles


def check_data(
    cfg: DictConfig, trained: list[str] | None, few: int | None = None
) -> Callable[[torch.nn.Module], dict]:
    """Build what evaluations use, so that what is wrong with it ends a run before its first step.

    Args:
        trained: names of the data sets of training, which are loaded; None if nothing is trained.
        few: how many images of each test set to evaluate on, if not all.

    Returns:
        The evaluation of a model. Metrics of several test sets are nested by the sets' names.
    """
    singles = single_tests(cfg)
    loaders = [build_loader(single, "test", few=few) for single in singles.values()]
    evaluators = [build(single, "dataloader.evaluator") for single in singles.values()]
    if all(isinstance(evaluator, COCOEvaluator) for evaluator in evaluators):
        with usage_errors("the config"):
            for name in singles:
                num_classes = OmegaConf.select(cfg, "model.decoder.num_classes")
                check_datasets([*(trained or []), *singles], name, num_classes)
        if trained is not None:
            check_best_metric(cfg, list(singles))

    def evaluate(model: torch.nn.Module) -> dict:
        results = {}
        for name, loader, evaluator in zip(singles, loaders, evaluators):
            with printed_to_log():
                results[name] = inference_on_dataset(model, loader, evaluator)
            print_csv_format(results[name])
        results = results if len(results) > 1 else results[name]
        for line in evaluation_lines(results):
            logger.info("%s", line)
        return results

    return evaluate


def check_best_metric(cfg: DictConfig, names: list[str]) -> None:
    """Raise a :class:`UsageError` if COCO's evaluations of the test sets give no such metric.

    Of other evaluators the first evaluation tells.
    """
    classes = MetadataCatalog.get(names[0]).thing_classes
    metrics = [*COCO_METRICS, *(f"AP-{x}" for x in classes if len(classes) > 1)]
    tasks = cfg.dataloader.evaluator.get("tasks") or ["bbox"]
    known = [f"{task}/{metric}" for task in tasks for metric in metrics]
    if len(names) > 1:
        known = [f"{name}/{metric}" for name in names for metric in known]
    best = cfg.train.best_metric
    if best not in known:
        same = [metric for metric in known if metric.endswith(f"/{best}")]
        raise UsageError(no_metric(best, same or known))


def check_data_set_names(cfg: DictConfig) -> None:
    """Raise a :class:`UsageError` on a name of no data set, with the nearest."""
    for part in ("train", "test"):
        node = cfg.dataloader[part].get("dataset", {})
        key = f"dataloader.{part}.dataset.names"
        with usage_errors(key):
            names = dataset_names(node)
        if node.get("json_file") is not None:
            continue  # the name that a file comes with may be new
        for name in names:
            if name not in DatasetCatalog:
                close = nearest(name, DatasetCatalog.list())
                raise UsageError(f"{key}={name}: no data set has this name{close}")
