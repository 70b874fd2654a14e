"""D-FINE-N on COCO: two levels, 160 epochs at one size (published: 42.8 AP)."""

from ..common.coco_schedule import train_for
from .dfine_s_coco import dataloader, lr_multiplier, model, optimizer, train

model.encoder.update(
    in_features=["stage3", "stage4"],
    in_channels=[512, 1024],
    hidden_dim=128,
    dim_feedforward=512,
    use_encoder_idx=[1],
    expansion=0.34,
    depth_mult=0.5,
)
model.decoder.update(
    in_channels=["${...encoder.hidden_dim}"] * 2,
    hidden_dim=128,
    dim_feedforward=512,
    num_points=[6, 6],
)
model.multi_scale = []
dataloader.train.total_batch_size = 128
optimizer.lr = 8e-4
train.output_dir = "./output/dfine_n_coco"
train_for(160, 12, 500, train, dataloader, model, lr_multiplier)
