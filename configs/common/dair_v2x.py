"""The data part for DAIR-V2X's infrastructure side, below $DETECTRON2_DATASETS or in ``root``; the
test set's follows the training set's."""

from detectron2.config import LazyCall as L

from dset_d2.data.dair_v2x import dair_v2x_dataset

from .data import dataloader

dataloader.train.dataset = L(dair_v2x_dataset)(names="dair_v2x_i_train", root="", split_file="")
dataloader.test.dataset = L(dair_v2x_dataset)(
    names="dair_v2x_i_val",
    root="${dataloader.train.dataset.root}",
    split_file="${dataloader.train.dataset.split_file}",
)
