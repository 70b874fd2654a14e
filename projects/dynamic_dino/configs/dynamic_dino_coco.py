"""Dynamic-DINO (https://arxiv.org/abs/2507.17436): Grounding DINO with experts in the place of its
decoder's FFNs, of which it trains these, the attention between image and text, and the heads."""

from detectron2.config import LazyCall as L

from dset_d2.modeling.sparse import MoEConfig, SwapConfig

from .common.grounding_dino import EXPERTS, FUSION, HEADS
from .grounding_dino_coco import dataloader, lr_multiplier, model, optimizer, train

model.swap = L(SwapConfig)(
    moe=L(MoEConfig)(num_experts=8, top_k=2, balance_weight=0.01),
    method="paper",
    layers=["network.model.decoder.*"],
)
model.trainable = [*FUSION, *EXPERTS, *HEADS]
train.output_dir = "./output/dynamic_dino_coco"
