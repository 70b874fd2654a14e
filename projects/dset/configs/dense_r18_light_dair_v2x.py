"""The control of DSET-R18-light's experts: dense FFNs as wide as what one token uses of them."""

from .common.r18 import dataloader, lr_multiplier, model, optimizer, train

model.encoder.dim_feedforward = 512  # 1 of 2 experts of 512
model.decoder.dim_feedforward = 688  # 2 of 3 experts of 344
train.output_dir = "./output/dense_r18_light_dair_v2x"
