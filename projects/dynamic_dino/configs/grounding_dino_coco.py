"""Grounding DINO on COCO, or on COCO-format files of your own, by the names of the classes."""

from detectron2.config import LazyCall as L

from dset_d2.data.coco import coco_dataset
from dset_d2.engine.optimizer import flat_cosine

from ....configs.common.data import dataloader
from ....configs.common.optim import optimizer
from ....configs.common.train import train
from .common.grounding_dino import keep_aspect, model, slow_backbones

dataloader.train.dataset = L(coco_dataset)(names="coco_2017_train", json_file="", image_root="")
dataloader.test.dataset = L(coco_dataset)(names="coco_2017_val", json_file="", image_root="")
keep_aspect(dataloader)
slow_backbones(optimizer)
lr_multiplier = L(flat_cosine)(
    max_iter="${train.max_iter}", warmup_iters="${part_of_run:1,100}", flat=0.6, floor=0.01
)
train.update(output_dir="./output/grounding_dino_coco", epochs=12)
