"""Decoder of RT-DETR (https://arxiv.org/abs/2304.08069) and RT-DETRv2
(https://arxiv.org/abs/2407.17140)."""

import math
from collections import OrderedDict

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..layers import MLP, check_choice, inverse_sigmoid, projection, valid_tokens
from .deformable_attention import MSDeformableAttention
from .denoising import Denoising, make_denoising
from .queries import gather_tokens, make_anchors


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
    ) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = MSDeformableAttention(dim, num_heads, num_points, cross_attn_method)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.dropout3 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.dropout4 = nn.Dropout(dropout)
        self.norm3 = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def ffn(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout3(self.linear1(x).relu()))

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
        x = self.norm2(x + self.dropout2(self.cross_attn(x + position, reference, **memory)))
        return self.norm3(x + self.dropout4(self.ffn(x)))


class TransformerDecoder(nn.Module):
    """The layers alone; what they share (heads, positions) belongs to the decoder around them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class RTDETRDecoder(nn.Module):
    """Selects the encoder's best tokens as queries and refines their boxes layer by layer.

    Args:
        num_classes: number of object classes.
        in_channels: channels of the encoder's outputs, finest first.
        num_layers: decoder layers that are trained.
        eval_idx: layer whose output inference returns; negative counts from the last.
        num_points: sampling points per level.
        cross_attn_method: "default" (bilinear) or "discrete" sampling.
        query_select_method: "default" (best class score) or "agnostic" (one objectness score).
        num_denoising: positives of the denoising part; 0 turns it off.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: tuple[int, ...] = (256, 256, 256),
        hidden_dim: int = 256,
        num_queries: int = 300,
        num_heads: int = 8,
        num_layers: int = 6,
        dim_feedforward: int = 1024,
        dropout: float = 0.0,
        eval_idx: int = -1,
        num_points: tuple[int, ...] = (4, 4, 4),
        cross_attn_method: str = "default",
        query_select_method: str = "default",
        num_denoising: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("query_select_method", query_select_method, ("default", "agnostic"))
        if len(num_points) != len(in_channels):
            raise ValueError(
                f"num_points={list(num_points)} needs one number for each of the "
                f"{len(in_channels)} levels of in_channels={list(in_channels)}"
            )
        if not -num_layers <= eval_idx < num_layers:
            raise ValueError(f"eval_idx={eval_idx} is not a layer of num_layers={num_layers}")
        if num_denoising < 0:
            raise ValueError(f"num_denoising={num_denoising} must not be negative")
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.eval_idx = eval_idx % num_layers
        self.num_denoising = num_denoising
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale

        self.input_proj = nn.ModuleList(projection(c, hidden_dim) for c in in_channels)
        self.decoder = TransformerDecoder(
            [
                TransformerDecoderLayer(
                    hidden_dim, num_heads, dim_feedforward, dropout, num_points, cross_attn_method
                )
                for _ in range(num_layers)
            ]
        )
        self.denoising_class_embed = nn.Embedding(num_classes + 1, hidden_dim, num_classes)
        self.query_pos_head = MLP(4, 2 * hidden_dim, hidden_dim, 2)
        self.enc_output = nn.Sequential(
            OrderedDict(proj=nn.Linear(hidden_dim, hidden_dim), norm=nn.LayerNorm(hidden_dim))
        )
        scores = 1 if query_select_method == "agnostic" else num_classes
        self.enc_score_head = nn.Linear(hidden_dim, scores)
        self.enc_bbox_head = MLP(hidden_dim, hidden_dim, 4, 3)
        self.dec_score_head = nn.ModuleList(
            nn.Linear(hidden_dim, num_classes) for _ in range(num_layers)
        )
        self.dec_bbox_head = nn.ModuleList(
            MLP(hidden_dim, hidden_dim, 4, 3) for _ in range(num_layers)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for head in (self.enc_score_head, *self.dec_score_head):
            nn.init.constant_(head.bias, -math.log(99))  # probability .01
        for head in (self.enc_bbox_head, *self.dec_bbox_head):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        nn.init.xavier_uniform_(self.enc_output.proj.weight)
        for layer in self.query_pos_head.layers:
            nn.init.xavier_uniform_(layer.weight)
        for project in self.input_proj:
            nn.init.xavier_uniform_(project.conv.weight)

    @classmethod
    def from_config(cls, cfg) -> dict:
        node = cfg.MODEL.DECODER
        levels = len(node.NUM_POINTS)
        return {
            "num_classes": node.NUM_CLASSES,
            "in_channels": [cfg.MODEL.ENCODER.HIDDEN_DIM] * levels,
            "hidden_dim": node.HIDDEN_DIM,
            "num_queries": node.NUM_QUERIES,
            "num_heads": node.NUM_HEADS,
            "num_layers": node.NUM_LAYERS,
            "dim_feedforward": node.DIM_FEEDFORWARD,
            "eval_idx": node.EVAL_IDX,
            "num_points": node.NUM_POINTS,
            "cross_attn_method": node.CROSS_ATTN_METHOD,
            "query_select_method": node.QUERY_SELECT_METHOD,
            "num_denoising": node.NUM_DENOISING,
        }

    def forward(
        self,
        features: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        valid_ratio: Tensor | None = None,
    ) -> dict:
        """Detect.

        Args:
            features: (B, C_l, H_l, W_l) per level, finest first.
            targets: per image ``labels`` (n,) and ``boxes`` (n, 4) cx, cy, w, h in [0, 1];
                needed in training if denoising is on.
            valid_ratio: (B, 2) share of the padded width and height that each image fills.

        Returns:
            ``pred_logits`` (B, Q, C) and ``pred_boxes`` (B, Q, 4) cx, cy, w, h in [0, 1]; in
            training also ``aux_outputs`` (the earlier layers), ``enc_outputs`` (the selected
            tokens) and, with denoising, ``dn_outputs`` (all layers) and ``denoising``.
        """
        features = [project(x) for project, x in zip(self.input_proj, features)]
        shapes = [tuple(x.shape[2:]) for x in features]
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in features], dim=1)
        valid = None
        if valid_ratio is not None:
            valid = torch.cat([valid_tokens(valid_ratio, *shape) for shape in shapes], dim=1)
        content, reference, selected = self.select_queries(
            memory, make_anchors(shapes, memory.device, valid_ratio), valid
        )

        denoising = None
        if self.training and self.num_denoising > 0:
            denoising = make_denoising(
                targets,
                self.denoising_class_embed,
                content.shape[1],
                self.num_denoising,
                self.label_noise_ratio,
                self.box_noise_scale,
            )
            content = torch.cat([denoising.content, content], dim=1)
            reference = torch.cat([denoising.reference, reference], dim=1)

        logits, boxes = self.refine(
            content,
            reference.sigmoid(),
            denoising.attn_mask if denoising else None,
            memory=memory,
            shapes=shapes,
            valid=valid,
            valid_ratio=valid_ratio,
        )
        return self.collect(logits, boxes, selected, denoising)

    def select_queries(
        self, memory: Tensor, anchors: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Content (B, Q, dim) and box logits (B, Q, 4) of the tokens with the best scores.

        Tokens whose anchor is invalid enter as zeros, here only: cross-attention reads them as
        they are. The box head runs on the selected tokens alone. An image with fewer tokens than
        ``num_queries`` has as many queries as tokens.
        """
        tokens = self.enc_output(memory * anchors[..., :1].isfinite())
        scores = self.enc_score_head(tokens)
        best = scores.max(-1).values
        if valid is not None:
            best = best.masked_fill(~valid, -torch.inf)
        _, index = best.topk(min(self.num_queries, best.shape[1]), dim=1)
        content = gather_tokens(tokens, index)
        anchors = gather_tokens(anchors.expand(len(memory), -1, -1), index)
        reference = self.enc_bbox_head(content).float() + anchors
        selected = {"pred_logits": gather_tokens(scores, index), "pred_boxes": reference.sigmoid()}
        return content.detach(), reference.detach(), selected

    def refine(
        self, content: Tensor, reference: Tensor, attn_mask: Tensor | None, **memory
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the layers; logits and boxes of all of them in training, else of one."""
        logits, boxes = [], []
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
                logits.append(self.dec_score_head[index](content))
                boxes.append(full)
            elif index == self.eval_idx:
                return [self.dec_score_head[index](content)], [refined]
            previous, reference = refined, refined.detach()
        return logits, boxes

    def collect(
        self,
        logits: list[Tensor],
        boxes: list[Tensor],
        selected: dict[str, Tensor],
        denoising: Denoising | None,
    ) -> dict:
        """Sort the layers' predictions into the groups that the criterion knows."""
        outputs = {}
        if denoising:
            size = [denoising.num_queries, logits[0].shape[1] - denoising.num_queries]
            noised_logits, logits = zip(*(x.split(size, dim=1) for x in logits))
            noised_boxes, boxes = zip(*(x.split(size, dim=1) for x in boxes))
            outputs["dn_outputs"] = predictions(noised_logits, noised_boxes)
            outputs["denoising"] = denoising
        layers = predictions(logits, boxes)
        outputs.update(layers[-1])
        if self.training:
            outputs["aux_outputs"] = layers[:-1]
            outputs["enc_outputs"] = [selected]
        return outputs


def predictions(logits, boxes) -> list[dict[str, Tensor]]:
    return [{"pred_logits": x, "pred_boxes": y} for x, y in zip(logits, boxes)]
