"""RT-DETRv2-R18 on the vehicle side of the cooperative DAIR-V2X-C."""

from .rtdetrv2_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset.names = "dair_v2x_c_v_train"
dataloader.test.dataset.names = "dair_v2x_c_v_val"
train.update(output_dir="./output/rtdetrv2_r18_dair_v2x_c_v", images=9322)
