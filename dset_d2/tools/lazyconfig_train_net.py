"""Train and evaluate from a LazyConfig file.

Every config of this project also runs with Detectron2's own ``tools/lazyconfig_train_net.py``.
This launcher adds what that one has no seam for, as ``train.*`` settings: averaged weights
(``ema``), the best checkpoint and early stopping by a named metric, an end on non-finite losses
that names them, losses on the test set (``validation_loss``), checkpoints that are never
half-written, errors on misspelt overrides, output folders that hold one run each, and a report of
it (``report``).

    python -m dset_d2.tools.lazyconfig_train_net --config-file configs/rtdetr/rtdetrv2_r18_coco.py
    ... --resume                      continue the run in train.output_dir
    ... --overwrite                   replace it
    ... --check                       try all of it on a few images, and write nothing
    ... --eval-only train.init_checkpoint=output/model_best.pth      or released weights
    ... train.epochs=12 dataloader.train.total_batch_size=8          all schedules follow
    torchrun --nproc_per_node=8 -m dset_d2.tools.lazyconfig_train_net --config-file ...
"""

import copy
import logging
import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import default_argument_parser, hooks, launch
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from ..checkpoint import load_initial, load_upstream
from ..config import find_config
from ..data.checks import dataset_names, target_name
from ..engine.checkpointer import AtomicCheckpointer
from ..engine.console import ConsoleWriter, set_up_logs
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
)
from ..engine.trainer import Trainer
from ..engine.validation import validation_loader, validation_losses
from ..files import disk_error
from .common import (
    UsageError,
    build_model,
    check_weights,
    class_names,
    entry_point,
    evaluated_names,
    own_weights,
    read_config,
    usage_errors,
)
from .preparation import (
    build_loader,
    check_data,
    check_data_set_names,
    fit_schedules,
    load_training_set,
    some,
)
from .report import write_report

logger = logging.getLogger("dset_d2")  # not __main__, which nobody listens to

FEW = 8  # images that --check looks at of each data set


def build_ema(cfg: DictConfig, model: torch.nn.Module) -> ModelEMA | None:
    settings = cfg.train.ema
    return ModelEMA(model, settings.decay, settings.warmup) if settings.enabled else None


def pictures(cfg: DictConfig, model: torch.nn.Module) -> Pictures | None:
    """Pictures of the first test image for TensorBoard, if image and classes are known."""
    if evaluated_names(cfg) == [None] or "dataset" not in cfg.dataloader.test:
        return None
    dataset_dict = instantiate(cfg.dataloader.test.dataset)[0]
    mapper = instantiate(cfg.dataloader.test.mapper)
    return Pictures(cfg.train.eval_period, model, dataset_dict, mapper, class_names(cfg))


def validation(cfg: DictConfig) -> Callable[[torch.nn.Module], dict[str, float]] | None:
    """The losses of a model on the test set, as in training but for augmentation, if asked for."""
    if not cfg.train.validation_loss:
        return None
    node = cfg.dataloader.test
    if "dataset" not in node or target_name(node.get("mapper", {})) != "DETRMapper":
        raise UsageError(
            "train.validation_loss=true needs a dataloader.test of dataset, DETRMapper"
        )
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    loader = validation_loader(
        instantiate(node.dataset),
        instantiate({**node.mapper, "is_train": True}),
        max(1, (batch or 1) // comm.get_world_size()),
        node.num_workers,
    )
    return partial(validation_losses, loader=loader)


def train(cfg: DictConfig, args: Namespace) -> None:
    output_dir = cfg.train.output_dir
    resumed = args.resume and Path(output_dir, LAST).exists()
    check_data_set_names(cfg)
    dataset = load_training_set(cfg)
    fit_schedules(cfg, dataset)
    saved_cfg = copy.deepcopy(cfg)  # before the model is put into it
    model = build_model(cfg)
    logger.debug("Model:\n%s", model)
    if cfg.train.init_checkpoint and not (resumed or cfg.train.resume_from):
        with initial_weights(cfg):
            load_initial(model, cfg.train.init_checkpoint, cfg.train.upcycling)
    few = FEW if args.check else None
    loader = build_loader(cfg, "train", some(dataset, few))  # looking at all images takes longest
    evaluate = check_data(cfg, dataset_names(cfg.dataloader.train.get("dataset", {})), few)
    validate = validation(cfg)
    ema = build_ema(cfg, model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    parallel = create_ddp_model(model, **cfg.train.ddp)
    trainer = Trainer(parallel, loader, optimizer, cfg.train.amp.enabled, cfg.train.accumulate)
    averaged: dict[str, Any] = {"ema": ema} if ema else {}
    checkpointer = AtomicCheckpointer(parallel, output_dir, trainer=trainer, **averaged)
    best = AtomicCheckpointer(parallel, output_dir, tag_last=False, **averaged)

    def best_model(own: torch.nn.Module) -> torch.nn.Module:
        """That of the averaged weights if there are any."""
        return ema.module if ema and ema.updates else own

    if args.check:
        check(cfg, trainer, lambda: evaluate(parallel), some(dataset, few))
        return
    period = cfg.train.eval_period
    saving = cfg.train.checkpointer
    metric = cfg.train.best_metric
    main = comm.is_main_process()
    patience = cfg.train.early_stopping_patience
    stopping = EarlyStopping(period, metric, patience) if patience else None
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    trainer.register_hooks(
        [
            # By default it waits three steps; in a run that ends before, the ETA divides by zero.
            hooks.IterationTimer(warmup_iter=1),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            ConfigSaver(saved_cfg, f"{output_dir}/{CONFIG}") if main else None,
            EMAHook(ema, model) if ema else None,
            EpochReporter(cfg.train.images / batch) if batch else None,
            pictures(cfg, model) if main else None,
            StatisticsHook([period, saving.period], model, ema),
            ValidationLoss(period, lambda: validate(best_model(model))) if validate else None,
            Evaluation(period, lambda: evaluate(best_model(parallel)), metric),
            # These follow the evaluation, so that a checkpoint knows of its results.
            BestCheckpointer(period, best, metric) if main else None,
            stopping,
        ]
    )
    start = 0
    if source := checkpointer.get_checkpoint_file() if resumed else cfg.train.resume_from:
        with usage_errors(f"{'--resume from ' if resumed else 'train.resume_from='}{source}"):
            checkpointer.load(source)
        start = trainer.iter + 1
    if main and not resumed:  # only now, as all that could be checked is built and loaded
        for path in written(Path(output_dir)):
            path.unlink()
    if main:
        writers = make_writers(output_dir, cfg.train.max_iter)
        # Last, so that a run which is killed has logged all that it resumes from.
        last = [
            hooks.PeriodicWriter(writers, cfg.train.log_period),
            PeriodicCheckpointer(checkpointer, **saving),
        ]
        trainer.register_hooks(last)
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


def check(
    cfg: DictConfig,
    trainer: Trainer,
    evaluate: Callable[[], dict],
    dataset: Sequence | Dataset | None,
) -> None:
    """Make one training step and one evaluation, and say what a run of this config would be."""
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.iter = 0
    start = time.perf_counter()
    with EventStorage() as trainer.storage:
        trainer.run_step()
        loss, _ = trainer.storage.latest()["total_loss"]
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    metrics = flatten_results_dict(evaluate())
    waited = time.perf_counter() - start
    loading = describe_loading(cfg, dataset, seconds)  # of all processes, whose samplers agree
    if not comm.is_main_process():
        return
    batch, metric = cfg.dataloader.train.total_batch_size, cfg.train.best_metric
    metric = f"{metric} is there" if metric in metrics else f"no {metric}"
    steps = cfg.train.max_iter
    length = timedelta(seconds=round(steps * seconds))
    memory = ""
    if torch.cuda.is_available():
        memory = f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB of GPU memory"
    for what, found in {
        "data": f"{cfg.train.images} images for training",
        "model": f"{trained / 1e6:.1f} M trained parameters",
        "weights": cfg.train.init_checkpoint
        or own_weights(cfg)
        or "random: train.init_checkpoint names none",
        "training": f"a step of {batch} images took {seconds:.2f} s{memory}; loss {loss:.2f}",
        "loading": loading,
        "evaluation": f"{FEW} images of each test set took {waited:.1f} s; {metric}",
        "run": f"{steps} steps, {steps * batch / cfg.train.images:.1f} epochs; about {length}",
    }.items():
        print(f"{what:>10}: {found}")


def describe_loading(
    cfg: DictConfig, dataset: Sequence | Dataset | None, step_seconds: float
) -> str:
    """Whether images are read, composed and augmented as fast as steps use them."""
    if dataset is None or "num_workers" not in cfg.dataloader.train:
        return "by an outside package's loader"
    single = copy.deepcopy(cfg)
    workers, single.dataloader.train.num_workers = cfg.dataloader.train.num_workers, 0
    batches = iter(build_loader(single, "train", dataset))
    next(batches)  # sets up what is set up once
    start = time.perf_counter()
    count = len(next(batches))
    rate, used = count / (time.perf_counter() - start), count / step_seconds
    places = f"{workers} of them" if workers else "the training's own"
    text = f"a process prepares {rate:.1f} images/s ({places}), a step uses {used:.1f}"
    if rate * workers < used:
        text += "; training waits for them: raise dataloader.train.num_workers"
    return text


def initial_weights(cfg: DictConfig) -> AbstractContextManager:
    return usage_errors(f"train.init_checkpoint={cfg.train.init_checkpoint}")


def set_up(cfg: DictConfig, args: Namespace) -> None:
    """Logs and random numbers, as by Detectron2's ``default_setup``.

    That one would also replace the config of the run in the folder before anything is tried.
    """
    rank = comm.get_rank()
    set_up_logs(cfg.train.output_dir, rank)
    if not args.check:
        logger.info("%s: all is in %s/log.txt", args.config_file, cfg.train.output_dir)
    logger.debug("Environment:\n%s", collect_env_info())
    logger.debug("Command line: %s", args)
    logger.debug("Config:\n%s", Path(args.config_file).read_text())
    seed_all_rng(None if cfg.train.seed < 0 else cfg.train.seed + rank)


def check_resumable(path: Path, folder: Path, overwrite: bool) -> None:
    """Raise an error unless a run in a folder can start from a checkpoint."""
    check_weights(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if overwrite and path.parent.resolve() == folder.resolve():
        raise ValueError(f"{path}: --overwrite removes it; name another train.output_dir")


def join_torchrun(device: str) -> None:
    """Join the processes that torchrun started, as Detectron2's ``launch`` joins its own."""
    cuda = torch.device(device).type == "cuda"
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def main(args: Namespace) -> None:
    cfg = read_config(args.config_file, args.opts)
    set_up(cfg, args)
    if not args.eval_only:
        train(cfg, args)
        if cfg.train.report and comm.is_main_process() and not args.check:
            write_report(cfg, args.config_file, args.opts)
        return
    model = build_model(cfg)
    if cfg.train.init_checkpoint:
        with initial_weights(cfg):
            load_upstream(model, cfg.train.init_checkpoint, whole=True)
    check_data_set_names(cfg)
    evaluate = check_data(cfg, None)
    evaluate(create_ddp_model(model, **cfg.train.ddp))


@entry_point
def run(argv: list[str] | None = None) -> None:
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"try a training step and an evaluation of {FEW} images, and write nothing",
    )
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error("--config-file is required")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with what --overwrite removes")
    if args.check and (args.resume or args.overwrite or args.eval_only):
        parser.error("--check tries a new run")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    torchrun = torch.distributed.is_torchelastic_launched()
    if processes > 1 and not torchrun:
        parser.error(f"WORLD_SIZE={processes}, but no group of processes: start it by torchrun")
    if torchrun and args.num_gpus * args.num_machines > 1:
        parser.error("torchrun starts the processes: leave --num-gpus and --num-machines out")
    # What is wrong with it shall end this process, not the ones that it may start.
    cfg = read_config(args.config_file, args.opts)
    args.config_file = str(find_config(args.config_file))
    if args.eval_only and not (cfg.train.init_checkpoint or own_weights(cfg)):
        hint = " or model.folder=FOLDER" if "folder" in cfg.model else ""
        raise UsageError(f"--eval-only needs train.init_checkpoint=FILE{hint}")
    folder = Path(cfg.train.output_dir)
    if not args.eval_only and cfg.train.resume_from:
        with usage_errors("train.resume_from"):
            check_resumable(Path(cfg.train.resume_from), folder, args.overwrite)
    first = os.environ.get("RANK", "0") == "0" and args.machine_rank == 0
    try:
        with ExitStack() as stack:
            if args.check:
                folder = Path(stack.enter_context(TemporaryDirectory()))
                args.opts = [*args.opts, f"train.output_dir={folder}"]
            elif not args.eval_only and first:
                with usage_errors("train.output_dir"):
                    stack.enter_context(claimed(folder, args.resume, args.overwrite))
            if torchrun:
                join_torchrun(cfg.train.device)
                main(args)
                return
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
