"""The data part for your own: set the paths of COCO-format files, or ``names`` to those of
registered data sets.

Our tools read the number of classes from them where a config has None.
"""

from detectron2.config import LazyCall as L

from dset_d2.data.coco import coco_dataset

from .data import dataloader

dataloader.train.dataset = L(coco_dataset)(names="custom_train", json_file="", image_root="")
dataloader.test.dataset = L(coco_dataset)(names="custom_val", json_file="", image_root="")
