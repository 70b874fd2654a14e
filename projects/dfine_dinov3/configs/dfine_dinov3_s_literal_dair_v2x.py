"""The plan's own settings, as it states them; made for 8 processes of 2 images.

The plain adapter with 256 channels, nearest upsampling and no norm; the ViT frozen for 10 epochs,
then one more of its last 4 blocks trained with each epoch; rates of 1e-5 for the ViT and 2.5e-4
for the rest, which drop at each of these blocks and are a tenth behind the last. Where memory is
short: train.accumulate=2. What the plan leaves open is as in its neighbour.
"""

from detectron2.config import LazyCall as L

from dset_d2.engine.optimizer import UnfreezingDrops, warmup_constant
from dset_d2.modeling import PlainAdapter

from .dfine_dinov3_s_dair_v2x import dataloader, model, optimizer, train

model.backbone.taps = [11]
model.backbone.adapter = L(PlainAdapter)(in_channels=384, out_channels=256, upsampling="nearest")
model.backbone.freeze.update(
    unfreeze_step="${part_of_run:10,60}", unfreeze_every="${part_of_run:1,60}"
)
optimizer.lr = 2.5e-4
optimizer.params.rules.vit.factor = 1e-5 / 2.5e-4
lr_multiplier = L(UnfreezingDrops)(
    schedule=L(warmup_constant)(max_iter="${train.max_iter}", warmup_iters="${part_of_run:2,60}"),
    max_iter="${train.max_iter}",
    freeze="${model.backbone.freeze}",
    last=0.1,
)
dataloader.train.total_batch_size = 8 * 2
train.output_dir = "./output/dfine_dinov3_s_literal_dair_v2x"
