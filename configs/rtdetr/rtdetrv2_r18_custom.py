"""RT-DETRv2-R18 on your own data, whose paths or names you set when you run it."""

from detectron2.config import LazyCall as L

from dset_d2.engine.optimizer import flat_cosine

from ..common.custom_data import dataloader
from .rtdetrv2_r18_coco import model, optimizer, train

model.decoder.num_classes = None  # the data set's
train.output_dir = "./output/rtdetrv2_r18_custom"
train.epochs = 72
dataloader.strong_augmentation_end = "${part_of_run:65,72}"
lr_multiplier = L(flat_cosine)(
    max_iter="${train.max_iter}", warmup_iters="${part_of_run:4,72}", flat=0.5, floor=0.01
)
train.ema.update(decay=0.999, warmup=500)
