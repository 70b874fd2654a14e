"""Convolutional blocks of the cross-scale feature fusion."""

from torch import Tensor, nn

from ..layers import ConvNorm, activation


class RepVggBlock(nn.Module):
    """3x3 and 1x1 convolutions side by side, summed (no identity branch)."""

    def __init__(self, channels: int, act: str) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 1)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x))


class CSPRepLayer(nn.Module):
    """Cross-stage partial layer of RepVGG blocks; its two paths are summed.

    (B, in_channels, H, W) -> (B, out_channels, H, W)
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, expansion: float, act: str
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.conv1 = ConvNorm(in_channels, hidden, 1, act=act)
        self.conv2 = ConvNorm(in_channels, hidden, 1, act=act)
        self.bottlenecks = nn.Sequential(*(RepVggBlock(hidden, act) for _ in range(num_blocks)))
        if hidden == out_channels:
            self.conv3 = nn.Identity()
        else:
            self.conv3 = ConvNorm(hidden, out_channels, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))
