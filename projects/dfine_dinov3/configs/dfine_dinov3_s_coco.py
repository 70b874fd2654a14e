"""D-FINE on a DINOv3 ViT-S/16 with 25 M parameters, on COCO, 60 epochs.

The ViT is frozen for 6 epochs (phase A); then its last 4 blocks are trained at a tenth of the
rate (phase B). Fill its weights in before (README): a frozen ViT that was never trained is noise.
"""

from detectron2.config import LazyCall as L

from dset_d2.engine.optimizer import flat_cosine
from dset_d2.modeling import DINOv3, FreezeConfig, SpatialTuningAdapter

from ....configs.common.coco_schedule import OTHER_SCALES, train_for
from ....configs.common.data import dataloader
from ....configs.common.models.dfine_s import model
from ....configs.common.optim import optimizer
from ....configs.common.train import train

model.backbone = L(DINOv3)(
    name="vit_small_patch16_dinov3_qkvb",
    taps=[5, 8, 11],
    vit={},
    adapter=L(SpatialTuningAdapter)(in_channels=384, out_channels=160, conv_channels=16),
    freeze=L(FreezeConfig)(unfreeze_step=0, unfreeze_blocks=4),
    lora=None,
    gradient_checkpointing=False,
)
model.encoder.update(
    in_features=["p3", "p4", "p5"],
    in_channels=["${...backbone.adapter.out_channels}"] * 3,
    hidden_dim=160,
    dim_feedforward=320,
    depth_mult=1.0,
)
model.decoder.update(hidden_dim=160, dim_feedforward=320)
# ImageNet's, as DINOv3 was trained.
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]
model.multi_scale = OTHER_SCALES + [640] * 20

dataloader.train.total_batch_size = 32
optimizer.lr = 5e-4
optimizer.weight_decay = 1.25e-4
# Low-rank updates and routers start from nothing and learn like the rest; the final norm as the
# last block.
_new = r".*\.(lora_|router\.)"
optimizer.params.rules.update(
    vit=dict(pattern=rf"^backbone\.dinov3\.(?!{_new})", factor=0.1),
    vit_depth=dict(
        pattern=rf"^backbone\.dinov3\.(?!norm\.|{_new})(blocks\.(?P<block>\d+)\.)?", decay=1.0
    ),
)
train.ema.warmup = 1000
train.output_dir = "./output/dfine_dinov3_s_coco"
lr_multiplier = L(flat_cosine)(
    max_iter="${train.max_iter}",
    warmup_iters=0,
    flat=0.5,
    floor=0.5,
    final=6 / 60,
)
model.backbone.freeze.unfreeze_step = "${part_of_run:6,60}"
train_for(60, 6, 2000, train, dataloader, model, lr_multiplier)
