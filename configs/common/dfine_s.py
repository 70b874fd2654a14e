"""D-FINE-S; the other sizes change a few of its values."""

from detectron2.config import LazyCall as L

from dset_d2.modeling import (
    DETRDetector,
    DFINECriterion,
    DFINEDecoder,
    HGNetv2,
    HungarianMatcher,
    HybridEncoder,
)

model = L(DETRDetector)(
    backbone=L(HGNetv2)(name="B0", use_lab=True, freeze_at=-1, freeze_norm=False),
    encoder=L(HybridEncoder)(
        in_features=["stage2", "stage3", "stage4"],
        in_channels=[256, 512, 1024],
        hidden_dim=256,
        num_heads=8,
        dim_feedforward=1024,
        dropout=0.0,
        enc_act="gelu",
        use_encoder_idx=[2],
        num_encoder_layers=1,
        fusion="gelan",
        expansion=0.5,
        depth_mult=0.34,
        act="silu",
    ),
    decoder=L(DFINEDecoder)(
        num_classes=80,
        in_channels=["${...encoder.hidden_dim}"] * 3,
        hidden_dim=256,
        num_queries=300,
        num_heads=8,
        num_layers=3,
        dim_feedforward=1024,
        dropout=0.0,
        eval_idx=-1,
        num_points=[3, 6, 3],
        cross_attn_method="default",
        query_select_method="default",
        num_denoising=100,
        label_noise_ratio=0.5,
        box_noise_scale=1.0,
        layer_scale=1.0,
        reg_max=32,
        up=0.5,
        reg_scale=4.0,
    ),
    criterion=L(DFINECriterion)(
        num_classes="${..decoder.num_classes}",
        matcher=L(HungarianMatcher)(
            cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2.0
        ),
        weights={"vfl": 1.0, "mal": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5},
        classification="vfl",
        alpha=0.75,
        gamma=2.0,
        mal_gamma=1.5,
        temperature=5.0,
    ),
    pixel_mean=[0.0, 0.0, 0.0],
    pixel_std=[255.0, 255.0, 255.0],
    max_detections=300,
    multi_scale=[],
    multi_scale_end=0,
)
