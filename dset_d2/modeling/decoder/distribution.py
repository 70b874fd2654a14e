"""Boxes as distributions over the offsets of their edges (D-FINE,
https://arxiv.org/abs/2410.13842, section 4.1)."""

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert


def weighting_function(reg_max: int, up: Tensor, reg_scale: Tensor) -> Tensor:
    """(reg_max + 1,) offsets, ascending, symmetric around 0 and denser towards it.

    Args:
        up, reg_scale: (1,) each; their product bounds the offsets, of which the outermost two are
            twice as far.
    """
    bound = (up * reg_scale).abs()
    step = (bound + 1) ** (2 / (reg_max - 2))
    positive = step ** torch.arange(1, reg_max // 2, device=up.device) - 1
    zero = torch.zeros_like(bound)
    return torch.cat([-2 * bound, -positive.flip(0), zero, positive, 2 * bound])


class EdgeDistribution(nn.Module):
    """The bins that D-FINE spreads each edge's offset over, and boxes to and from them.

    Offsets point outwards and count in ``1 / reg_scale`` of a reference box's width or height.

    Args:
        reg_max: number of bins less one; even.
        up: reach of the inner bins, as a share of the reference box's size.
        reg_scale: larger values widen the bins towards both ends.
    """

    def __init__(self, reg_max: int = 32, up: float = 0.5, reg_scale: float = 4.0) -> None:
        super().__init__()
        if reg_max < 4 or reg_max % 2:
            raise ValueError(f"reg_max={reg_max} must be even and at least 4")
        if up <= 0 or reg_scale <= 0:
            raise ValueError(f"up={up} and reg_scale={reg_scale} must be positive")
        self.reg_max = reg_max
        # Frozen parameters as upstream's, so that weights keep the bins they were trained with.
        self.up = nn.Parameter(torch.tensor([float(up)]), requires_grad=False)
        self.reg_scale = nn.Parameter(torch.tensor([float(reg_scale)]), requires_grad=False)
        self.register_buffer("bins", torch.zeros(reg_max + 1), persistent=False)
        self.make_bins()
        self.register_load_state_dict_post_hook(EdgeDistribution.make_bins)

    @torch.no_grad()
    def make_bins(self, *_) -> None:
        self.bins.copy_(weighting_function(self.reg_max, self.up, self.reg_scale))

    def decode(self, reference: Tensor, probabilities: Tensor) -> Tensor:
        """Boxes at the mean offsets.

        Args:
            reference: (..., 4) boxes cx, cy, w, h.
            probabilities: (..., 4, reg_max + 1) of the left, top, right and bottom edge.

        Returns:
            (..., 4) boxes cx, cy, w, h.
        """
        centre, size = reference.split(2, dim=-1)
        # Not a matrix product, which autocast would run in half precision.
        reach = 0.5 + (probabilities * self.bins).sum(-1) / self.reg_scale
        low = centre - reach[..., :2] * size
        high = centre + reach[..., 2:] * size
        return torch.cat([(low + high) / 2, high - low], dim=-1)

    def encode(self, reference: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The two neighbouring bins that enclose each edge's offset.

        Args:
            reference, boxes: (M, 4) boxes cx, cy, w, h.

        Returns:
            (M, 4) index of the left bin, and (M, 4) share of the right one: 0 or 1 for offsets
            beyond the outermost bins.
        """
        centre, size = reference.split(2, dim=-1)
        low, high = box_convert(boxes, "cxcywh", "xyxy").split(2, dim=-1)
        reach = torch.cat([centre - low, high - centre], dim=-1)
        unit = (size / self.reg_scale + 1e-16).repeat(1, 2)
        offsets = reach / unit - 0.5 * self.reg_scale
        left = torch.bucketize(offsets, self.bins, right=True) - 1
        left = left.clamp(0, self.reg_max - 1)
        width = self.bins[left + 1] - self.bins[left]
        return left, ((offsets - self.bins[left]) / width).clamp(0, 1)
