"""Train and evaluate from a LazyConfig file.

Every config of this project also runs with Detectron2's own ``tools/lazyconfig_train_net.py``.
This launcher adds what that one has no seam for, as ``train.*`` settings: averaged weights
(``ema``), the best checkpoint and early stopping by a named metric, an end on non-finite losses
that names them, checkpoints that are never half-written, and errors on misspelt overrides.

    python -m dset_d2.tools.lazyconfig_train_net --config-file configs/rtdetr/rtdetrv2_r18_coco.py
    ... --resume                      continue the run in train.output_dir
    ... --eval-only train.init_checkpoint=output/model_best.pth      or released weights
    ... dataloader.train.total_batch_size=8 optimizer.lr=5e-5
"""

import logging
from argparse import Namespace
from contextlib import AbstractContextManager

import torch
from detectron2.config import instantiate
from detectron2.engine import (
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from ..checkpoint import load_upstream
from ..engine.checkpointer import AtomicCheckpointer, InitialCheckpointer
from ..engine.ema import ModelEMA
from ..engine.hooks import (
    BestCheckpointer,
    EarlyStopping,
    EMAHook,
    EpochReporter,
    SparsityPictures,
)
from ..engine.trainer import trainer_class
from ..modeling.sparse import MoE, TokenPruner
from .common import UsageError, build_model, entry_point, read_config, usage_errors

logger = logging.getLogger("dset_d2")  # not __main__, which nobody listens to


def evaluate(cfg: DictConfig, model: torch.nn.Module, ema: ModelEMA | None) -> dict:
    """Evaluate the averaged weights if there are any, else the model's own."""
    if ema is not None and ema.updates:
        model = ema.module
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    print_csv_format(results)
    return results


def build_ema(cfg: DictConfig, model: torch.nn.Module) -> ModelEMA | None:
    settings = cfg.train.ema
    return ModelEMA(model, settings.decay, settings.warmup) if settings.enabled else None


def sparsity_pictures(cfg: DictConfig, model: torch.nn.Module) -> SparsityPictures | None:
    """Pictures of the first test image for TensorBoard, if the model has anything sparse."""
    if not any(isinstance(module, MoE | TokenPruner) for module in model.modules()):
        return None
    dataset_dict = instantiate(cfg.dataloader.test.dataset)[0]
    mapper = instantiate(cfg.dataloader.test.mapper)
    return SparsityPictures(cfg.train.eval_period, model, dataset_dict, mapper)


def train(cfg: DictConfig, resume: bool) -> None:
    model = build_model(cfg)
    logger.info("Model:\n%s", model)
    ema = build_ema(cfg, model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    parallel = create_ddp_model(model, **cfg.train.ddp)
    make_trainer = trainer_class(cfg.train.amp.enabled, cfg.train.device)
    trainer = make_trainer(parallel, instantiate(cfg.dataloader.train), optimizer)
    averaged = {"ema": ema} if ema else {}
    output_dir = cfg.train.output_dir
    checkpointer = AtomicCheckpointer(parallel, output_dir, trainer=trainer, **averaged)
    best = AtomicCheckpointer(parallel, output_dir, tag_last=False, **averaged)

    period = cfg.train.eval_period
    metric = cfg.train.best_metric
    main = comm.is_main_process()
    patience = cfg.train.early_stopping_patience
    stopping = EarlyStopping(period, metric, patience) if patience else None
    writers = default_writers(output_dir, cfg.train.max_iter) if main else []
    trainer.register_hooks(
        [
            # By default it waits three steps; in a run that ends before, the ETA divides by zero.
            hooks.IterationTimer(warmup_iter=1),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            EMAHook(ema, model) if ema else None,
            EpochReporter(cfg.train.epoch_iters) if cfg.train.epoch_iters else None,
            sparsity_pictures(cfg, model) if main else None,
            hooks.EvalHook(period, lambda: evaluate(cfg, parallel, ema)),
            # These follow the evaluation, so that a checkpoint knows of its results.
            BestCheckpointer(period, best, metric) if main else None,
            stopping,
            hooks.PeriodicWriter(writers, cfg.train.log_period) if main else None,
            # Last, so that a run which is killed has logged all that it resumes from.
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
        ]
    )
    resumed = resume and checkpointer.has_checkpoint()
    if resumed:
        checkpointer.resume_or_load("", resume=True)
    else:
        with initial_weights(cfg):
            InitialCheckpointer(parallel).load(cfg.train.init_checkpoint)
    if stopping is not None and stopping.enough:
        logger.info("This run's patience is used up; a larger one lets it go on")
        trainer.stop_early()
    else:
        trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
    if trainer.stopped and main:
        checkpointer.save("model_final", iteration=trainer.iter)


def initial_weights(cfg: DictConfig) -> AbstractContextManager:
    return usage_errors(f"train.init_checkpoint={cfg.train.init_checkpoint}")


def main(args: Namespace) -> None:
    cfg = read_config(args.config_file, args.opts)
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="dset_d2")
    if not args.eval_only:
        train(cfg, args.resume)
        return
    if not cfg.train.init_checkpoint:
        raise UsageError("--eval-only needs train.init_checkpoint=FILE")
    model = build_model(cfg)
    with initial_weights(cfg):
        load_upstream(model, cfg.train.init_checkpoint, whole=True)
    evaluate(cfg, create_ddp_model(model, **cfg.train.ddp), None)


@entry_point
def run(argv: list[str] | None = None) -> None:
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error("--config-file is required")
    # What is wrong with it shall end this process, not the ones that it may start.
    read_config(args.config_file, args.opts)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    run()
