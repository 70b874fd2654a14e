"""DSET-R18 by the literal reading: every expert as wide as the dense FFN, top-k times its cost."""

from .dset_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.moe.expert_dim = model.encoder.dim_feedforward
model.decoder.moe.expert_dim = model.decoder.dim_feedforward
train.output_dir = "./output/dset_r18_full_dair_v2x"
