"""How a run goes; the keys of Detectron2's common train config, then those of our launcher."""

import torch

train = dict(
    output_dir="./output",
    init_checkpoint="",
    seed=-1,
    max_iter=90000,
    amp=dict(enabled=False),
    # Our models move their inputs themselves, so that device_ids are needed on no device.
    ddp=dict(
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=False,
        fp16_compression=False,
    ),
    checkpointer=dict(period=5000, max_to_keep=3),
    eval_period=5000,
    log_period=20,
    device="cuda" if torch.cuda.is_available() else "cpu",
    # Read by dset_d2.tools.lazyconfig_train_net only:
    epoch_iters=0,  # steps of one pass over the training set, to log epochs; 0 logs none
    ema=dict(enabled=True, decay=0.9999, warmup=2000),
    best_metric="bbox/AP",
    early_stopping_patience=0,  # evaluations without a better best_metric; 0 never stops early
)
