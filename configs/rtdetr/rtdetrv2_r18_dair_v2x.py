"""RT-DETRv2-R18 on the infrastructure side of DAIR-V2X, up to 100 epochs at 640 x 640."""

from detectron2.config import LazyCall as L

from dset_d2.engine.optimizer import flat_cosine

from ..common.dair_v2x import dataloader
from ..common.models.rtdetr_r18 import model
from ..common.optim import optimizer
from ..common.train import train

model.decoder.num_classes = 8

dataloader.strong_augmentation_end = "${part_of_run:90,100}"
optimizer.update(lr=1e-4, clip_norm=10.0)
optimizer.params.rules.backbone.factor = 0.1
# Sparse parts are new where the rest of the encoder is pretrained.
optimizer.params.rules.encoder = dict(
    pattern=r"^encoder\.(?!.*\b(router|experts|pruner)\b)", factor=0.1
)
lr_multiplier = L(flat_cosine)(
    max_iter="${train.max_iter}", warmup_iters="${part_of_run:3,100}", flat=0.0, floor=0.01
)
train.update(
    output_dir="./output/rtdetrv2_r18_dair_v2x",
    epochs=100,
    images=5042,
    early_stopping_patience=35,
)
