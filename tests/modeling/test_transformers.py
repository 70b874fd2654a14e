"""The same weights give the same detections in Hugging Face's independent implementation."""

import re

import pytest
import torch
from detectron2.config import instantiate

import dset_d2

from ..conftest import randomise

transformers = pytest.importorskip("transformers")

# Their parameter names -> ours.
RENAMES = (
    (r"^class_embed\.", "model.decoder.class_embed."),
    (r"^bbox_embed\.", "model.decoder.bbox_embed."),
    (r"^model\.backbone\.model\.embedder\.embedder\.0\.", "backbone.conv1.conv1_1."),
    (r"^model\.backbone\.model\.embedder\.embedder\.1\.", "backbone.conv1.conv1_2."),
    (r"^model\.backbone\.model\.embedder\.embedder\.2\.", "backbone.conv1.conv1_3."),
    (
        r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.",
        r"backbone.res_layers.\1.blocks.",
    ),
    (r"\.layer\.0\.", ".branch2a."),
    (r"\.layer\.1\.", ".branch2b."),
    (r"\.shortcut\.1\.", ".short.conv."),
    (r"\.shortcut\.", ".short."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
    (r"^model\.(encoder|decoder)_input_proj\.(\d)\.0", r"\1.input_proj.\2.conv"),
    (r"^model\.(encoder|decoder)_input_proj\.(\d)\.1", r"\1.input_proj.\2.norm"),
    (r"^model\.encoder\.aifi\.", "encoder.encoder."),
    (r"^model\.encoder\.", "encoder."),
    (r"^model\.enc_output\.0", "decoder.enc_output.proj"),
    (r"^model\.enc_output\.1", "decoder.enc_output.norm"),
    (r"^model\.(enc_|denoising)", r"decoder.\1"),
    (r"^model\.decoder\.layers\.", "decoder.decoder.layers."),
    (r"^model\.decoder\.class_embed", "decoder.dec_score_head"),
    (r"^model\.decoder\.bbox_embed", "decoder.dec_bbox_head"),
    (r"^model\.decoder\.query_pos_head", "decoder.query_pos_head"),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.mlp\.fc", ".linear"),
    (r"\.o_proj\.", ".out_proj."),
)


def our_value(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The value of their parameter among ours; their q, k, v are parts of one matrix of ours."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    if projection := re.search(r"\.([qkv])_proj\.(weight|bias)$", name):
        packed = state[f"{name[: projection.start()]}.in_proj_{projection[2]}"]
        return packed.chunk(3)["qkv".index(projection[1])]
    return state[name]


def test_same_detections():
    torch.manual_seed(0)
    ours = randomise(instantiate(dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_coco.py").model))
    backbone = transformers.RTDetrResNetConfig(
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=3,
        num_labels=80,
        anchor_image_size=None,
    )
    theirs = transformers.RTDetrV2ForObjectDetection(config)
    state = ours.state_dict()
    theirs.load_state_dict(
        {
            name: value if "n_points_scale" in name else our_value(name, state)
            for name, value in theirs.state_dict().items()
        }
    )
    images = torch.rand(2, 3, 256, 256)
    with torch.no_grad():
        mine = ours.eval().predict(images)
        other = theirs.eval()(images)
    mine = torch.cat([mine["pred_logits"], mine["pred_boxes"]], -1)
    other = torch.cat([other.logits, other.pred_boxes], -1)
    distance = (mine[:, :, None] - other[:, None]).abs().amax(-1).amin(1)
    assert (distance < 1e-4).float().mean() >= 0.99
