"""DSET-R18, light: 60 % of the tokens, fewer and wider experts."""

from .dset_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.pruning.keep_ratio = 0.6
model.encoder.moe.update(num_experts=2, top_k=1)
model.decoder.moe.update(num_experts=3, top_k=2)
train.output_dir = "./output/dset_r18_light_dair_v2x"
