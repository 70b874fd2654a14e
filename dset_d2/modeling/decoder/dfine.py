"""Decoder of D-FINE (https://arxiv.org/abs/2410.13842): distributions of edges, refined."""

import logging

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..layers import MLP, inverse_sigmoid
from ..registry import DECODER_REGISTRY
from .base import DETRDecoder, TransformerDecoderLayer, box_head
from .deformable_attention import Memory
from .denoising import Denoising
from .distribution import EdgeDistribution

logger = logging.getLogger(__name__)


class Gate(nn.Module):
    """Weighs two inputs by gates that see both: (B, Q, dim) twice -> (B, Q, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * dim, 2 * dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        gate1, gate2 = self.gate(torch.cat([x1, x2], dim=-1)).sigmoid().chunk(2, dim=-1)
        return self.norm(gate1 * x1 + gate2 * x2)


class GatedDecoderLayer(TransformerDecoderLayer):
    """RT-DETR's layer with a gate around the cross-attention, which has no projections."""

    def __init__(self, dim: int, *args) -> None:
        super().__init__(dim, *args, project_values=False)  # type: ignore[misc]
        del self.norm2  # the gate has its own
        self.gateway = Gate(dim)

    def join(self, x: Tensor, attended: Tensor) -> Tensor:
        return self.gateway(x, attended)

    def feed_forward(self, x: Tensor) -> Tensor:
        # Infinities of half precision become its largest numbers, as upstream's do.
        return super().feed_forward(x).clamp(-65504, 65504)


class LQE(nn.Module):
    """Location quality estimator: corrects the class logits by how peaked the edges are.

    Args:
        k: highest probabilities of each edge that it looks at, beside their mean.
    """

    def __init__(self, k: int = 4, hidden_dim: int = 64) -> None:
        super().__init__()
        self.k = k
        self.reg_conf = MLP(4 * (k + 1), hidden_dim, 1, 2)
        nn.init.zeros_(self.reg_conf.layers[-1].weight)
        nn.init.zeros_(self.reg_conf.layers[-1].bias)

    def forward(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """(B, Q, C) logits and (B, Q, 4, bins) probabilities -> (B, Q, C)."""
        best = probabilities.topk(self.k, dim=-1).values
        statistics = torch.cat([best, best.mean(-1, keepdim=True)], dim=-1)
        return logits + self.reg_conf(statistics.flatten(2))


def repeat_channels(x: Tensor, dim: int) -> Tensor:
    """Repeat channels: (B, N, C) -> (B, N, dim)."""
    return x if x.shape[-1] == dim else F.interpolate(x, size=dim)


@DECODER_REGISTRY.register()
class DFINEDecoder(DETRDecoder):
    """Refines, layer by layer, how each edge is distributed around one first box.

    Args:
        layer_scale: width of the layers above ``eval_idx``, which only training has, relative
            to ``hidden_dim``; at least 1.
        reg_max, up, reg_scale: see :class:`EdgeDistribution`.
        settings: see :class:`DETRDecoder`.
    """

    layer = GatedDecoderLayer
    criterion = "DFINECriterion"
    project_always = False

    @configurable
    def __init__(
        self,
        *,
        num_layers: int = 6,
        eval_idx: int = -1,
        num_points: tuple[int, ...] = (3, 6, 3),
        layer_scale: float = 1.0,
        reg_max: int = 32,
        up: float = 0.5,
        reg_scale: float = 4.0,
        **settings,
    ) -> None:
        if layer_scale < 1:
            raise ValueError(f"layer_scale={layer_scale} must be at least 1")
        last = eval_idx % num_layers
        super().__init__(
            num_layers=num_layers,
            eval_idx=eval_idx,
            num_points=num_points,
            box_outputs=4 * (reg_max + 1),
            scales=[1.0 if i <= last else layer_scale for i in range(num_layers)],
            **settings,
        )
        if self.memory_pruner is not None:
            logger.warning("memory_pruning saves D-FINE nothing: it projects no values")
        self.decoder.lqe_layers = nn.ModuleList(LQE() for _ in range(num_layers))
        self.distribution = EdgeDistribution(reg_max, up, reg_scale)
        self.pre_bbox_head = box_head(self.widths[0])

    def scoring(self) -> list[nn.ModuleList]:
        return [*super().scoring(), self.decoder.lqe_layers]

    def refine(
        self, content: Tensor, reference: Tensor, attn_mask: Tensor | None, memory: Memory
    ) -> list[dict[str, Tensor]]:
        """As in the base class; in training the first entry is the box that layers start from."""
        layers = []
        last = self.last_layer()
        first = reference  # the box of the first layer, around which all edges are distributed
        previous = torch.zeros_like(content)
        corners = 0.0  # logits of the bins
        for index, layer in enumerate(self.decoder.layers):
            width = self.widths[index]
            position = repeat_channels(self.query_pos_head(reference).clamp(-10, 10), width)
            content, previous = repeat_channels(content, width), repeat_channels(previous, width)
            memory = memory._replace(tokens=repeat_channels(memory.tokens, width))
            content = layer(content, reference, position, attn_mask, memory)
            if index == 0:
                delta = self.pre_bbox_head(content).float()
                first = (delta + inverse_sigmoid(reference)).sigmoid()
            corners = corners + self.dec_bbox_head[index](content + previous).float()
            probabilities = corners.unflatten(-1, (4, -1)).softmax(-1)
            boxes = self.distribution.decode(first.detach(), probabilities)
            if self.training or index == last:
                logits = self.dec_score_head[index](content)
                if self.training and index == 0:
                    layers.append({"pred_logits": logits, "pred_boxes": first})
                logits = self.decoder.lqe_layers[index](logits, probabilities)
                layers.append({"pred_logits": logits, "pred_boxes": boxes})
            if self.training:
                layers[-1] |= {"pred_corners": corners, "ref_points": first.detach()}
            elif index == last:
                break
            reference, previous = boxes.detach(), content.detach()
        return layers

    def collect(
        self,
        layers: list[dict[str, Tensor]],
        selected: dict[str, Tensor],
        denoising: Denoising | None,
    ) -> dict:
        """Adds ``pre_outputs`` and ``dn_pre_outputs``, the first boxes, and ``distribution``."""
        outputs = super().collect(layers, selected, denoising)
        if self.training:
            outputs["pre_outputs"] = outputs["aux_outputs"].pop(0)
            outputs["distribution"] = self.distribution
        if denoising:
            outputs["dn_pre_outputs"] = outputs["dn_outputs"].pop(0)
        return outputs
