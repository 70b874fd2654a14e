"""A tiny Grounding DINO of random weights for minutes of training on a CPU, on the infrastructure
side of DAIR-V2X or on generated scenes in its layout."""

from ....configs.rtdetr.rtdetrv2_r18_roadside import dataloader, lr_multiplier, optimizer, train
from .common.grounding_dino import model
from .grounding_dino_dair_v2x import model as _dair_v2x

# MM Grounding DINO's head scales its logits and gives them a bias: it learns from random weights,
# where Grounding DINO's own first has to unlearn that everything is everywhere.
model.architecture = dict(
    model_type="mm-grounding-dino",
    backbone_config=dict(
        model_type="swin",
        image_size=64,
        embed_dim=32,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=7,
        drop_path_rate=0.0,
        out_features=["stage2", "stage3", "stage4"],
    ),
    text_config=dict(
        model_type="bert",
        vocab_size=1030,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
    ),
    d_model=64,
    encoder_layers=2,
    encoder_ffn_dim=256,
    encoder_attention_heads=4,
    decoder_layers=3,
    decoder_ffn_dim=256,
    decoder_attention_heads=4,
    num_queries=60,
    max_text_len=64,
    dropout=0.0,
    fusion_droppath=0.0,
)
model.prompts = _dair_v2x.prompts
optimizer.params.rules = {}
train.output_dir = "./output/grounding_dino_tiny_roadside"
