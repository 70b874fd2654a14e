"""How a run goes; the keys of Detectron2's common train config, then those of our launcher."""

import torch

train = dict(
    output_dir="./output",
    init_checkpoint="",
    seed=-1,
    # The length. Where configs give steps as ${epochs:N} or ${part_of_run:N,M} (dset_d2.config),
    # these follow it, the batch and the data set.
    epochs=72,
    images=118287,  # of training; our launcher counts them
    max_iter="${epochs:${train.epochs}}",
    amp=dict(enabled=False),
    # Our models move their inputs themselves, so that device_ids are needed on no device.
    ddp=dict(
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=False,
        fp16_compression=False,
    ),
    checkpointer=dict(period="${train.eval_period}", max_to_keep=3),
    eval_period="${epochs:1}",
    log_period=20,
    device="cuda" if torch.cuda.is_available() else "cpu",
    # Read by dset_d2.tools.lazyconfig_train_net only:
    # How experts start from init_checkpoint's FFNs: slots, copies, split or paper; auto takes what
    # fits of the first three, none leaves them fresh.
    upcycling="auto",
    resume_from="",  # a checkpoint to go on from, with its optimizer and its steps, in a new folder
    accumulate=1,  # parts of a batch that are computed in turn, to save memory
    lr_batch_size=0,  # batch that optimizer.lr is meant for: others scale it linearly; 0: none does
    ema=dict(enabled=True, decay=0.9999, warmup=2000),
    best_metric="bbox/AP",
    validation_loss=False,  # whether each evaluation also logs losses on the test set
    report=True,  # whether a finished run gets a report: report.md, .json and pictures
    early_stopping_patience=0,  # evaluations without a better best_metric; 0 never stops early
)
