"""The control of DSET-R34's experts: dense FFNs as wide as what one token uses of them."""

from .common.r34 import dataloader, lr_multiplier, model, optimizer, train

model.encoder.dim_feedforward = 504  # 3 of 6 experts of 168
model.decoder.dim_feedforward = 504  # 3 of 6 experts of 168
train.output_dir = "./output/dense_r34_dair_v2x"
