import pytest
import torch
from torch import nn

from dset_d2.modeling.encoder.fusion_blocks import RepVggBlock


@pytest.fixture
def block() -> RepVggBlock:
    """With statistics and scales as after training."""
    torch.manual_seed(0)
    block = RepVggBlock(6, "silu").eval()
    for norm in (block.conv1.norm, block.conv2.norm):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
    return block


def test_fused_block_computes_the_same(block):
    x = torch.randn(2, 6, 9, 7)
    expected, fused = block(x), block.fuse()
    torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in fused.parameters()) == 6 * 6 * 9 + 6


def test_statistics_that_still_change_are_not_fused(block):
    with pytest.raises(AssertionError, match="eval"):
        block.train().fuse()
