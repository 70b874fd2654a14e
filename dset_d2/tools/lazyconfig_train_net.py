"""Train and evaluate from a LazyConfig file.

Every config of this project also runs with Detectron2's own ``tools/lazyconfig_train_net.py``.
This launcher adds what that one has no seam for, as ``train.*`` settings: averaged weights
(``ema``), the best checkpoint and early stopping by a named metric, an end on non-finite losses
that names them, checkpoints that are never half-written, errors on misspelt overrides, and output
folders that hold one run each.

    python -m dset_d2.tools.lazyconfig_train_net --config-file configs/rtdetr/rtdetrv2_r18_coco.py
    ... --resume                      continue the run in train.output_dir
    ... --overwrite                   replace it
    ... --eval-only train.init_checkpoint=output/model_best.pth      or released weights
    ... dataloader.train.total_batch_size=8 optimizer.lr=5e-5
"""

import copy
import logging
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser, hooks, launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from omegaconf import DictConfig, OmegaConf

from ..checkpoint import load_initial, load_upstream
from ..config import find_config, nearest
from ..data.checks import check_datasets, check_images, dataset_names, target_name
from ..engine.checkpointer import AtomicCheckpointer
from ..engine.console import ConsoleWriter, evaluation_lines, printed_to_log, set_up_logs
from ..engine.ema import ModelEMA
from ..engine.folder import CONFIG, LAST, claimed, written
from ..engine.hooks import (
    BestCheckpointer,
    ConfigSaver,
    EarlyStopping,
    EMAHook,
    EpochReporter,
    Evaluation,
    PeriodicCheckpointer,
    Pictures,
    StatisticsHook,
    ValidationLoss,
    no_metric,
)
from ..engine.trainer import trainer_class
from ..engine.validation import validation_loader, validation_losses
from ..files import disk_error
from .common import UsageError, build, build_model, entry_point, read_config, usage_errors
from .report import write_report

logger = logging.getLogger("dset_d2")  # not __main__, which nobody listens to

COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def build_loader(cfg: DictConfig, part: str) -> Iterable:
    """The config's loader for training or test, once its data set's image files were looked at."""
    node = cfg.dataloader[part]
    with usage_errors(f"the config's dataloader.{part}"):
        if "dataset" not in node or target_name(node.get("mapper", {})) != "DETRMapper":
            return instantiate(node)  # an outside package's, which may read anything
        dataset = instantiate(node.dataset)
        if comm.is_main_process() and hasattr(dataset, "__len__"):
            check_images(dataset, node.mapper.get("skip_unreadable", False))
        return instantiate({**node, "dataset": dataset})


def check_data(cfg: DictConfig, trained: list[str]) -> Callable[[torch.nn.Module], dict]:
    """Build what evaluations use, so that what is wrong with it ends a run before its first step.

    Args:
        trained: names of the data sets of training, which are loaded.

    Returns:
        The evaluation of a model.
    """
    loader = build_loader(cfg, "test")
    evaluator = build(cfg, "dataloader.evaluator")
    if type(evaluator) is COCOEvaluator:  # of others the first evaluation tells
        name = cfg.dataloader.evaluator.dataset_name
        with usage_errors("the config"):
            check_datasets(trained, name, OmegaConf.select(cfg, "model.decoder.num_classes"))
        classes = MetadataCatalog.get(name).thing_classes
        metrics = [*COCO_METRICS, *(f"AP-{x}" for x in classes if len(classes) > 1)]
        tasks = cfg.dataloader.evaluator.get("tasks") or ["bbox"]
        known = [f"{task}/{metric}" for task in tasks for metric in metrics]
        if cfg.train.best_metric not in known:
            raise UsageError(no_metric(cfg.train.best_metric, known))

    def evaluate(model: torch.nn.Module) -> dict:
        with printed_to_log():
            results = inference_on_dataset(model, loader, evaluator)
        print_csv_format(results)
        for line in evaluation_lines(results):
            logger.info("%s", line)
        return results

    return evaluate


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
    name = OmegaConf.select(cfg, "dataloader.evaluator.dataset_name")
    if OmegaConf.is_list(name):
        raise UsageError(f"dataloader.test: {name}: an evaluator scores one data set, not a list")


def build_ema(cfg: DictConfig, model: torch.nn.Module) -> ModelEMA | None:
    settings = cfg.train.ema
    return ModelEMA(model, settings.decay, settings.warmup) if settings.enabled else None


def pictures(cfg: DictConfig, model: torch.nn.Module) -> Pictures | None:
    """Pictures of the first test image for TensorBoard, if image and classes are known."""
    name = OmegaConf.select(cfg, "dataloader.evaluator.dataset_name")
    if name is None or "dataset" not in cfg.dataloader.test:
        return None
    dataset_dict = instantiate(cfg.dataloader.test.dataset)[0]
    mapper = instantiate(cfg.dataloader.test.mapper)
    classes = MetadataCatalog.get(name).thing_classes
    return Pictures(cfg.train.eval_period, model, dataset_dict, mapper, classes)


def validation(cfg: DictConfig) -> Callable[[torch.nn.Module], dict[str, float]] | None:
    """The losses of a model on the test set, as in training but for augmentation, if asked for."""
    if not cfg.train.validation_loss:
        return None
    node = cfg.dataloader.test
    if "dataset" not in node or target_name(node.get("mapper", {})) != "DETRMapper":
        raise UsageError(
            "train.validation_loss=true needs a dataloader.test of dataset, DETRMapper"
        )
    loader = validation_loader(
        instantiate(node.dataset),
        instantiate({**node.mapper, "is_train": True}),
        max(1, cfg.dataloader.train.total_batch_size // comm.get_world_size()),
        node.num_workers,
    )
    return partial(validation_losses, loader=loader)


def train(cfg: DictConfig, resume: bool) -> None:
    saved_cfg = copy.deepcopy(cfg)  # before the model is put into it
    output_dir = cfg.train.output_dir
    resumed = resume and Path(output_dir, LAST).exists()
    model = build_model(cfg)
    logger.debug("Model:\n%s", model)
    if cfg.train.init_checkpoint and not resumed:
        with initial_weights(cfg):
            load_initial(model, cfg.train.init_checkpoint)
    # Data last, as they take longest to load.
    check_data_set_names(cfg)
    loader = build_loader(cfg, "train")
    evaluate = check_data(cfg, dataset_names(cfg.dataloader.train.get("dataset", {})))
    validate = validation(cfg)
    ema = build_ema(cfg, model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    parallel = create_ddp_model(model, **cfg.train.ddp)
    make_trainer = trainer_class(cfg.train.amp.enabled, cfg.train.device)
    trainer = make_trainer(parallel, loader, optimizer)
    averaged = {"ema": ema} if ema else {}
    checkpointer = AtomicCheckpointer(parallel, output_dir, trainer=trainer, **averaged)
    best = AtomicCheckpointer(parallel, output_dir, tag_last=False, **averaged)

    def best_model(own: torch.nn.Module) -> torch.nn.Module:
        """That of the averaged weights if there are any."""
        return ema.module if ema and ema.updates else own

    period = cfg.train.eval_period
    saving = cfg.train.checkpointer
    metric = cfg.train.best_metric
    main = comm.is_main_process()
    patience = cfg.train.early_stopping_patience
    stopping = EarlyStopping(period, metric, patience) if patience else None
    if main and not resumed:  # only now, as all that could be checked is built and loaded
        for path in written(Path(output_dir)):
            path.unlink()
    writers = make_writers(output_dir, cfg.train.max_iter) if main else []
    trainer.register_hooks(
        [
            # By default it waits three steps; in a run that ends before, the ETA divides by zero.
            hooks.IterationTimer(warmup_iter=1),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            ConfigSaver(saved_cfg, f"{output_dir}/{CONFIG}") if main else None,
            EMAHook(ema, model) if ema else None,
            EpochReporter(cfg.train.images / cfg.dataloader.train.total_batch_size),
            pictures(cfg, model) if main else None,
            StatisticsHook([period, saving.period], model, ema),
            ValidationLoss(period, lambda: validate(best_model(model))) if validate else None,
            Evaluation(period, lambda: evaluate(best_model(parallel)), metric),
            # These follow the evaluation, so that a checkpoint knows of its results.
            BestCheckpointer(period, best, metric) if main else None,
            stopping,
            hooks.PeriodicWriter(writers, cfg.train.log_period) if main else None,
            # Last, so that a run which is killed has logged all that it resumes from.
            PeriodicCheckpointer(checkpointer, **saving) if main else None,
        ]
    )
    start = 0
    if resumed:
        with usage_errors(f"--resume from {checkpointer.get_checkpoint_file()}"):
            checkpointer.resume_or_load("", resume=True)
        start = trainer.iter + 1
    if start >= cfg.train.max_iter:
        logger.info(
            "This run is finished after %d steps; a larger train.max_iter extends it", start
        )
    elif stopping is not None and stopping.enough:
        logger.info("This run's patience is used up; a larger one lets it go on")
    else:
        trainer.train(start, cfg.train.max_iter)
    final = checkpointer.get_checkpoint_file().endswith("model_final.pth")
    if main and (trainer.stopped or not final):
        checkpointer.save("model_final", iteration=trainer.iter)


def make_writers(output_dir: str, max_iter: int) -> list[EventWriter]:
    """As Detectron2's, but with our console."""
    files = [JSONWriter(f"{output_dir}/metrics.json"), TensorboardXWriter(output_dir)]
    return [ConsoleWriter(max_iter), *files]


def initial_weights(cfg: DictConfig) -> AbstractContextManager:
    return usage_errors(f"train.init_checkpoint={cfg.train.init_checkpoint}")


def set_up(cfg: DictConfig, args: Namespace) -> None:
    """Logs and random numbers, as by Detectron2's ``default_setup``.

    That one would also replace the config of the run in the folder before anything is tried.
    """
    rank = comm.get_rank()
    set_up_logs(cfg.train.output_dir, rank)
    logger.info(
        "%s: the log of all is %s/log.txt", Path(args.config_file).name, cfg.train.output_dir
    )
    logger.debug("Environment:\n%s", collect_env_info())
    logger.debug("Command line: %s", args)
    logger.debug("Config:\n%s", Path(args.config_file).read_text())
    seed_all_rng(None if cfg.train.seed < 0 else cfg.train.seed + rank)


def main(args: Namespace) -> None:
    cfg = read_config(args.config_file, args.opts)
    set_up(cfg, args)
    if not args.eval_only:
        train(cfg, args.resume)
        if cfg.train.report and comm.is_main_process():
            write_report(cfg, args.config_file, args.opts)
        return
    model = build_model(cfg)
    with initial_weights(cfg):
        load_upstream(model, cfg.train.init_checkpoint, whole=True)
    check_data_set_names(cfg)
    evaluate = check_data(cfg, [])
    evaluate(create_ddp_model(model, **cfg.train.ddp))


@entry_point
def run(argv: list[str] | None = None) -> None:
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error("--config-file is required")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with what --overwrite removes")
    # What is wrong with it shall end this process, not the ones that it may start.
    cfg = read_config(args.config_file, args.opts)
    args.config_file = str(find_config(args.config_file))
    if args.eval_only and not cfg.train.init_checkpoint:
        raise UsageError("--eval-only needs train.init_checkpoint=FILE")
    folder = Path(cfg.train.output_dir)
    try:
        with ExitStack() as stack:
            if not args.eval_only and args.machine_rank == 0:
                with usage_errors("train.output_dir"):
                    stack.enter_context(claimed(folder, args.resume, args.overwrite))
            launch(
                main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
    except Exception as error:
        refusal = disk_error(error)
        if refusal is None or refusal.errno not in (ENOSPC, EDQUOT):
            raise
        raise UsageError(f"{refusal.filename or folder}: {refusal.strerror}") from None


if __name__ == "__main__":
    run()
