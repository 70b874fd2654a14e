"""A narrow DSET-R18 for minutes of training on a CPU (``make demo``, ``make bench``)."""

from ....configs.rtdetr.rtdetrv2_r18_roadside import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)
from .common.sparse import _decoder_moe, _patch_moe, _pruning

model.encoder.update(pruning=_pruning, moe=_patch_moe)
model.encoder.pruning.update(min_tokens=8, end_step="${part_of_run:1,3}")
model.decoder.moe = _decoder_moe
model.decoder.moe.num_experts = 4
model.decoder.moe.top_k = 2
train.output_dir = "./output/dset_r18_roadside"
