"""RT-DETRv2-R18 on your own data; when you run it, set num_classes and the paths of COCO-format
files, or the names of registered data sets."""

from detectron2.config import LazyCall as L

from dset_d2.data.coco import coco_dataset
from dset_d2.engine.optimizer import flat_cosine

from .rtdetrv2_r18_coco import dataloader, model, optimizer, train

dataloader.train.dataset = L(coco_dataset)(names="custom_train", json_file="", image_root="")
dataloader.test.dataset = L(coco_dataset)(names="custom_val", json_file="", image_root="")
train.output_dir = "./output/rtdetrv2_r18_custom"
train.epochs = 72
dataloader.strong_augmentation_end = "${part_of_run:65,72}"
lr_multiplier = L(flat_cosine)(
    max_iter="${train.max_iter}", warmup_iters="${part_of_run:4,72}", flat=0.5, floor=0.01
)
train.ema.update(decay=0.999, warmup=500)
