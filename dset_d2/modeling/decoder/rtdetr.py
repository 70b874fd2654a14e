"""Decoder of RT-DETR (https://arxiv.org/abs/2304.08069) and RT-DETRv2
(https://arxiv.org/abs/2407.17140)."""

from detectron2.config import configurable
from torch import Tensor, nn

from ..layers import inverse_sigmoid
from ..sparse import MoE, MoEConfig, moe_layers
from .base import DETRDecoder, box_head, score_head
from .deformable_attention import MSDeformableAttention


class TransformerDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and FFN, each post-normalised."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        num_points: tuple[int, ...],
        cross_attn_method: str,
        moe: MoEConfig | None = None,
        project_values: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_dim={dim} must be divisible by num_heads={num_heads}")
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = MSDeformableAttention(
            dim, num_heads, num_points, cross_attn_method, project=project_values
        )
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.moe = None
        if moe is not None:
            self.moe = MoE(moe, dim, dim_feedforward, "relu")
        else:
            self.linear1 = nn.Linear(dim, dim_feedforward)
            self.dropout3 = nn.Dropout(dropout)
            self.linear2 = nn.Linear(dim_feedforward, dim)
            nn.init.xavier_uniform_(self.linear1.weight)
            nn.init.xavier_uniform_(self.linear2.weight)
        self.dropout4 = nn.Dropout(dropout)
        self.norm3 = nn.LayerNorm(dim)

    def ffn(self, x: Tensor) -> Tensor:
        if self.moe is not None:
            return self.moe(x)
        return self.linear2(self.dropout3(self.linear1(x).relu()))

    def join(self, x: Tensor, attended: Tensor) -> Tensor:
        """Queries and what cross-attention read for them -> (B, Q, dim)."""
        return self.norm2(x + attended)

    def forward(
        self, x: Tensor, reference: Tensor, position: Tensor, attn_mask: Tensor | None, **memory
    ) -> Tensor:
        """(B, Q, dim) -> (B, Q, dim).

        Args:
            reference: (B, Q, 4) boxes cx, cy, w, h in [0, 1].
            position: (B, Q, dim) added to the queries of both attentions and to the keys.
            attn_mask: (Q, Q) bool, True where attention is blocked.
            memory: what :class:`MSDeformableAttention` reads.
        """
        query = x + position
        attended, _ = self.self_attn(query, query, x, attn_mask=attn_mask, need_weights=False)
        x = self.norm1(x + self.dropout1(attended))
        x = self.join(x, self.dropout2(self.cross_attn(x + position, reference, **memory)))
        return self.norm3(x + self.dropout4(self.ffn(x)))


class TransformerDecoder(nn.Module):
    """The layers alone; what they share (heads, positions) belongs to the decoder around them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class RTDETRDecoder(DETRDecoder):
    """Refines boxes as logits, each layer from the box of the one before.

    Args:
        cross_attn_method: "default" (bilinear) or "discrete" sampling.
        moe: replaces the layers' FFNs by mixtures of experts.
        shared: see :class:`DETRDecoder`.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: tuple[int, ...] = (256, 256, 256),
        hidden_dim: int = 256,
        num_heads: int = 8,
        num_layers: int = 6,
        dim_feedforward: int = 1024,
        dropout: float = 0.0,
        num_points: tuple[int, ...] = (4, 4, 4),
        cross_attn_method: str = "default",
        moe: MoEConfig | None = None,
        **shared,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            in_channels=in_channels,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            num_points=num_points,
            **shared,
        )
        self.decoder = TransformerDecoder(
            [
                TransformerDecoderLayer(
                    hidden_dim,
                    num_heads,
                    dim_feedforward,
                    dropout,
                    num_points,
                    cross_attn_method,
                    experts,
                )
                for experts in moe_layers(moe, num_layers)
            ]
        )
        self.dec_score_head = nn.ModuleList(
            score_head(hidden_dim, num_classes) for _ in range(num_layers)
        )
        self.dec_bbox_head = nn.ModuleList(box_head(hidden_dim) for _ in range(num_layers))

    def refine(
        self, content: Tensor, reference: Tensor, attn_mask: Tensor | None, **memory
    ) -> list[dict[str, Tensor]]:
        layers = []
        previous = None
        for index, layer in enumerate(self.decoder.layers):
            position = self.query_pos_head(reference)
            content = layer(content, reference, position, attn_mask, **memory)
            delta = self.dec_bbox_head[index](content).float()
            refined = (delta + inverse_sigmoid(reference)).sigmoid()
            if self.training:
                # Gradients of layer i reach the box head of layer i - 1 through its box.
                full = refined
                if previous is not None:
                    full = (delta + inverse_sigmoid(previous)).sigmoid()
                logits = self.dec_score_head[index](content)
                layers.append({"pred_logits": logits, "pred_boxes": full})
            elif index == self.eval_idx:
                logits = self.dec_score_head[index](content)
                return [{"pred_logits": logits, "pred_boxes": refined}]
            previous, reference = refined, refined.detach()
        return layers
