"""DSET-R18 on the infrastructure side of the cooperative DAIR-V2X-C."""

from .dset_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset.names = "dair_v2x_c_i_train"
dataloader.test.dataset.names = "dair_v2x_c_i_val"
train.update(output_dir="./output/dset_r18_dair_v2x_c_i", images=8800)
