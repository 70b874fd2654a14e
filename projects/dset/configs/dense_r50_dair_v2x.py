"""The control of DSET-R50's experts: dense FFNs as wide as what one token uses of them."""

from .common.r50 import dataloader, lr_multiplier, model, optimizer, train

model.encoder.dim_feedforward = 512  # 2 of 4 experts of 256
model.decoder.dim_feedforward = 504  # 3 of 6 experts of 168
train.output_dir = "./output/dense_r50_dair_v2x"
