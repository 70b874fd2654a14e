"""The seam where experts take a dense FFN's place, in three libraries' blocks."""

import pytest
import timm
import torch
from torch import nn
from transformers.models.grounding_dino.configuration_grounding_dino import GroundingDinoConfig
from transformers.models.grounding_dino.modeling_grounding_dino import (
    GroundingDinoDecoderLayer,
    GroundingDinoTextEnhancerLayer,
)

from dset_d2.modeling import FFN, find_ffns
from dset_d2.modeling.encoder.hybrid_encoder import TransformerEncoderLayer
from dset_d2.modeling.sparse import MoE, MoEConfig

from ..conftest import tiny_model

TEXT = torch.randn(2, 5, 32)


def ours() -> tuple[nn.Module, tuple]:
    return TransformerEncoderLayer(32, 4, 64, 0.1, "gelu"), (TEXT, torch.randn(1, 5, 32))


def timms() -> tuple[nn.Module, tuple]:
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=1, num_heads=2)
    return vit.blocks[0], (TEXT,)


def transformers_decoder() -> tuple[nn.Module, tuple]:
    config = GroundingDinoConfig(
        d_model=32, decoder_attention_heads=4, decoder_ffn_dim=64, num_feature_levels=1,
        disable_custom_kernels=True, backbone_config={"model_type": "swin"},
    )  # fmt: skip
    memory = torch.randn(2, 12, 32)
    arguments = (
        TEXT,
        None,
        torch.rand(2, 5, 1, 2),
        torch.tensor([[3, 4]]),
        [(3, 4)],
        torch.tensor([0]),
        memory,
        None,
        torch.randn(2, 3, 32),
    )
    return GroundingDinoDecoderLayer(config), arguments


def transformers_text() -> tuple[nn.Module, tuple]:
    config = GroundingDinoConfig(
        d_model=32, encoder_attention_heads=8, encoder_ffn_dim=64,
        backbone_config={"model_type": "swin"},
    )  # fmt: skip
    return GroundingDinoTextEnhancerLayer(config), (TEXT, torch.ones(2, 5, 5, dtype=torch.bool))


def one_expert(seam) -> MoE:
    """An expert of the same weights, which always gets the tokens."""
    act = {nn.ReLU: "relu", nn.GELU: "gelu"}
    name = next((n for kind, n in act.items() if isinstance(seam.activation, kind)), None)
    name = name or type(seam.activation).__name__.removesuffix("Activation").lower()
    moe = MoE(MoEConfig(1, 1), seam.linear1.in_features, seam.linear1.out_features, name)
    with torch.no_grad():
        for ours, theirs in (
            (moe.experts.w1, seam.linear1.weight),
            (moe.experts.b1, seam.linear1.bias),
            (moe.experts.w2, seam.linear2.weight),
            (moe.experts.b2, seam.linear2.bias),
        ):
            ours.copy_(theirs)
    return moe


@pytest.mark.parametrize("make", [ours, timms, transformers_decoder, transformers_text])
def test_experts_take_the_place_and_the_ffn_returns(make):
    torch.manual_seed(0)
    block, arguments = make()
    block.eval()

    def run() -> torch.Tensor:
        with torch.no_grad():
            output = block(*arguments)
        return output[0] if isinstance(output, tuple) else output

    before, names = run(), list(block.state_dict())
    seams = find_ffns(block)
    assert list(seams) == [""]
    seam = seams[""]
    moe = one_expert(seam)
    called = []
    moe.register_forward_hook(lambda *_: called.append(1))
    dense = seam.replace(moe)
    torch.testing.assert_close(run(), before, rtol=1e-5, atol=1e-5)
    assert called == [1] and find_ffns(block) == {}
    assert seam.dropout == {ours: 0.1}.get(make, 0.0)
    assert any("router" in name for name in block.state_dict())
    seam.put(dense)
    assert torch.equal(run(), before) and list(block.state_dict()) == names


def test_seams_of_a_detector():
    seams = find_ffns(tiny_model())
    assert list(seams) == [
        "encoder.encoder.0.layers.0",
        *(f"decoder.decoder.layers.{i}" for i in range(3)),
    ]
    assert all(isinstance(seam.block.ffn, FFN) for seam in seams.values())
    # Gated FFNs (SwiGLU) have three matrices and are none of these.
    gated = timm.create_model("vit_small_plus_patch16_dinov3", embed_dim=32, depth=1, num_heads=2)
    assert find_ffns(gated) == {}
