"""What the decoders share: their layers, the choice of queries, denoising, and the grouping of
their outputs."""

import math
from collections import OrderedDict

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ...arguments import arguments, build
from ..context import Part, current
from ..encoder import Encoded
from ..layers import MLP, check_choice, projection
from ..sparse import MemoryPruner, MemoryPruningConfig, MoEConfig, make_ffn, moe_layers
from ..tokens import as_tokens, gather_tokens, prune
from .deformable_attention import Memory, MSDeformableAttention
from .denoising import Denoising, make_denoising
from .queries import make_anchors


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
        self.ffn = make_ffn(dim, dim_feedforward, "relu", dropout, moe)
        self.dropout4 = nn.Dropout(dropout)
        self.norm3 = nn.LayerNorm(dim)

    def join(self, x: Tensor, attended: Tensor) -> Tensor:
        """Queries and what cross-attention read for them -> (B, Q, dim)."""
        return self.norm2(x + attended)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)

    def forward(
        self,
        x: Tensor,
        reference: Tensor,
        position: Tensor,
        attn_mask: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        """(B, Q, dim) -> (B, Q, dim).

        Args:
            reference: (B, Q, 4) boxes cx, cy, w, h in [0, 1].
            position: (B, Q, dim) added to the queries of both attentions and to the keys.
            attn_mask: (Q, Q) bool, True where attention is blocked.
            memory: what cross-attention reads.
        """
        query = x + position
        attended, _ = self.self_attn(query, query, x, attn_mask=attn_mask, need_weights=False)
        x = self.norm1(x + self.dropout1(attended))
        x = self.join(x, self.dropout2(self.cross_attn(x + position, reference, memory)))
        return self.norm3(x + self.dropout4(self.feed_forward(x)))


class TransformerDecoder(nn.Module):
    """The layers alone; what they share (heads, positions) belongs to the decoder around them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class DETRDecoder(Part):
    """Selects the encoder's best tokens as queries, which a subclass refines layer by layer.

    Args:
        num_classes: number of object classes.
        in_channels: channels of the encoder's outputs, finest first.
        num_layers: decoder layers that are trained.
        eval_idx: layer whose output inference returns; negative counts from the last.
        num_points: sampling points per level.
        cross_attn_method: "default" (bilinear) or "discrete" sampling.
        query_select_method: "default" (best class score) or "agnostic" (one objectness score).
        num_denoising: positives of the denoising part; 0 turns it off.
        moe: replaces the layers' FFNs by mixtures of experts.
        memory_pruning: lets cross-attention read only the tokens with the best scores.
        box_outputs: numbers that each layer's box head puts out.
        scales: width of each layer relative to ``hidden_dim``.
    """

    kind = "decoder"
    layer: type[TransformerDecoderLayer] = TransformerDecoderLayer
    # The registered criterion that fits its predictions.
    criterion: str
    # Whether features that have the decoder's width already are projected all the same.
    project_always = True

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
        num_queries: int = 300,
        eval_idx: int = -1,
        query_select_method: str = "default",
        num_denoising: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
        moe: MoEConfig | None = None,
        memory_pruning: MemoryPruningConfig | None = None,
        box_outputs: int = 4,
        scales: list[float] | None = None,
    ) -> None:
        super().__init__()
        check_choice("query_select_method", query_select_method, ("default", "agnostic"))
        if len(num_points) != len(in_channels):
            raise ValueError(
                f"num_points={list(num_points)} needs one number for each of the "
                f"{len(in_channels)} levels of in_channels={list(in_channels)}"
            )
        if num_classes is None or num_classes < 1:
            raise ValueError(
                f"num_classes={num_classes} must be the number of the data set's categories"
            )
        if not -num_layers <= eval_idx < num_layers:
            raise ValueError(f"eval_idx={eval_idx} is not a layer of num_layers={num_layers}")
        if num_denoising < 0:
            raise ValueError(f"num_denoising={num_denoising} must not be negative")
        if moe is not None and moe.patch_size > 1:
            raise ValueError(
                f"patch_size={moe.patch_size}: queries stand on no feature map; it must be 1"
            )
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.num_layers = num_layers
        self.eval_idx = eval_idx % num_layers
        self.num_denoising = num_denoising
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        self.memory_pruner = None if memory_pruning is None else MemoryPruner(memory_pruning)

        self.input_proj = nn.ModuleList()
        for channels in in_channels:
            if channels == hidden_dim and not self.project_always:
                self.input_proj.append(nn.Identity())
            else:
                self.input_proj.append(projection(channels, hidden_dim))
                nn.init.xavier_uniform_(self.input_proj[-1].conv.weight)
        self.denoising_class_embed = nn.Embedding(num_classes + 1, hidden_dim, num_classes)
        self.denoising_class_embed.requires_grad_(num_denoising > 0)
        self.query_pos_head = MLP(4, 2 * hidden_dim, hidden_dim, 2)
        for layer in self.query_pos_head.layers:
            nn.init.xavier_uniform_(layer.weight)
        self.enc_output = nn.Sequential(
            OrderedDict(proj=nn.Linear(hidden_dim, hidden_dim), norm=nn.LayerNorm(hidden_dim))
        )
        nn.init.xavier_uniform_(self.enc_output.proj.weight)
        self.enc_score_head = score_head(
            hidden_dim, 1 if query_select_method == "agnostic" else num_classes
        )
        self.enc_bbox_head = box_head(hidden_dim)

        scales = scales or [1.0] * num_layers
        self.widths = [round(scale * hidden_dim) for scale in scales]
        self.decoder = TransformerDecoder(
            [
                self.layer(
                    width,
                    num_heads,
                    round(scale * dim_feedforward),
                    dropout,
                    num_points,
                    cross_attn_method,
                    experts,
                )
                for width, scale, experts in zip(self.widths, scales, moe_layers(moe, num_layers))
            ]
        )
        self.dec_score_head = nn.ModuleList(score_head(w, num_classes) for w in self.widths)
        self.dec_bbox_head = nn.ModuleList(box_head(w, box_outputs) for w in self.widths)

    @classmethod
    def from_config(cls, cfg) -> dict:
        node, moe, memory_pruning = cfg.MODEL.DECODER, None, None
        if node.MOE.NUM_EXPERTS:
            moe = build(MoEConfig, cfg, "MODEL.DECODER.MOE")
        if node.MEMORY_PRUNING.KEEP_RATIO not in (0, 1):
            memory_pruning = build(MemoryPruningConfig, cfg, "MODEL.DECODER.MEMORY_PRUNING")
        return arguments(cls, cfg, "MODEL.DECODER") | {
            "in_channels": [cfg.MODEL.ENCODER.HIDDEN_DIM] * len(node.NUM_POINTS),
            "moe": moe,
            "memory_pruning": memory_pruning,
        }

    def knob_limits(self) -> dict[str, float]:
        limits: dict[str, float] = {"num_queries": self.num_queries}
        if not any(isinstance(head, nn.Identity) for head in self.dec_score_head):
            limits["decoder_layers"] = self.num_layers
        return limits

    def fuse(self) -> "DETRDecoder":
        """For inference: without denoising, the layers above the evaluated one, and what only
        scores the outputs of those below it."""
        self.num_layers = self.eval_idx + 1
        self.denoising_class_embed = None
        for parts in (self.decoder.layers, self.dec_bbox_head, *self.scoring()):
            del parts[self.num_layers :]
        for parts in self.scoring():
            for index in range(self.eval_idx):
                parts[index] = nn.Identity()
        return self

    def scoring(self) -> list[nn.ModuleList]:
        """Parts by layer that nothing but the scores of the layer's outputs is made by."""
        return [self.dec_score_head]

    def last_layer(self) -> int:
        """Index of the layer whose output inference returns in this call."""
        layers = current().knobs.decoder_layers
        return self.eval_idx if layers is None else layers - 1

    def forward(self, encoded: Encoded, targets: list[dict[str, Tensor]] | None = None) -> dict:
        """Detect.

        Args:
            targets: per image ``labels`` (n,) and ``boxes`` (n, 4) cx, cy, w, h in [0, 1];
                needed in training if denoising is on.

        Returns:
            ``pred_logits`` (B, Q, C) and ``pred_boxes`` (B, Q, 4) cx, cy, w, h in [0, 1]; in
            training also ``aux_outputs`` (the earlier layers), ``enc_outputs`` (the selected
            tokens) and, with denoising, ``dn_outputs`` (all layers) and ``denoising``.
        """
        levels = len(self.input_proj)
        if len(encoded.features) != levels:
            raise ValueError(
                f"in_channels and num_points are for {levels} levels of the encoder's "
                f"{len(encoded.features)}"
            )
        features = [project(x) for project, x in zip(self.input_proj, encoded.features)]
        shapes = [tuple(x.shape[2:]) for x in features]
        tokens = torch.cat([as_tokens(x) for x in features], dim=1)
        valid = readable(shapes, encoded)
        content, reference, selected, scores = self.select_queries(
            tokens, make_anchors(shapes, tokens.device, encoded.padding), valid
        )
        kept = None
        if self.memory_pruner is not None:
            kept = self.memory_pruner(scores, least=content.shape[1])

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

        layers = self.refine(
            content,
            reference.sigmoid(),
            denoising.attn_mask if denoising else None,
            Memory(prune(tokens, kept), shapes, kept, valid, encoded.padding),
        )
        return self.collect(layers, selected, denoising)

    def select_queries(
        self, tokens: Tensor, anchors: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        """Content (B, Q, dim) and box logits (B, Q, 4) of the tokens with the best scores, their
        predictions, and the scores (B, N) of all tokens.

        Tokens whose anchor is invalid enter as zeros, here only: cross-attention reads them as
        they are. The box head runs on the selected tokens alone. An image with fewer tokens than
        ``num_queries`` has as many queries as tokens.
        """
        tokens = self.enc_output(tokens * anchors[..., :1].isfinite())
        logits = self.enc_score_head(tokens)
        scores = logits.max(-1).values
        if valid is not None:
            scores = scores.masked_fill(~valid, -torch.inf)
        num_queries = current().knobs.num_queries or self.num_queries
        _, index = scores.topk(min(num_queries, scores.shape[1]), dim=1)
        content = gather_tokens(tokens, index)
        reference = self.enc_bbox_head(content).float() + prune(anchors, index)
        selected = {"pred_logits": gather_tokens(logits, index), "pred_boxes": reference.sigmoid()}
        return content.detach(), reference.detach(), selected, scores.detach()

    def refine(
        self, content: Tensor, reference: Tensor, attn_mask: Tensor | None, memory: Memory
    ) -> list[dict[str, Tensor]]:
        """Run the layers.

        Args:
            content: (B, Q, dim).
            reference: (B, Q, 4) boxes cx, cy, w, h in [0, 1].
            attn_mask: (Q, Q) bool, True where attention is blocked.
            memory: what cross-attention reads.

        Returns:
            The predictions of all layers in training, else those of :meth:`last_layer`.
        """
        raise NotImplementedError

    def collect(
        self,
        layers: list[dict[str, Tensor]],
        selected: dict[str, Tensor],
        denoising: Denoising | None,
    ) -> dict:
        """Sort the layers' predictions into the groups that the criterion knows."""
        outputs: dict[str, object] = {}
        if denoising:
            size = denoising.num_queries
            noised = [{name: x[:, :size] for name, x in layer.items()} for layer in layers]
            layers = [{name: x[:, size:] for name, x in layer.items()} for layer in layers]
            outputs["dn_outputs"] = noised
            outputs["denoising"] = denoising
        outputs.update(layers[-1])
        if self.training:
            outputs["aux_outputs"] = layers[:-1]
            outputs["enc_outputs"] = [selected]
        return outputs


def readable(shapes: list[tuple[int, int]], encoded: Encoded) -> Tensor | None:
    """(B, N) bool of the tokens of all levels that are neither padding nor dropped; None: all."""
    padding, dropped = encoded.padding, encoded.dropped or [None] * len(shapes)
    if padding is None and all(mask is None for mask in dropped):
        return None
    levels = []
    for (height, width), feature, mask in zip(shapes, encoded.features, dropped):
        if padding is not None:
            valid = padding.valid_tokens(height, width)
        else:
            valid = feature.new_ones(feature.shape[0], height * width, dtype=torch.bool)
        levels.append(valid if mask is None else valid & ~mask)
    return torch.cat(levels, dim=1)


def score_head(dim: int, num_classes: int) -> nn.Linear:
    """Class logits that start at a probability of .01."""
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, -math.log(99))
    return head


def box_head(dim: int, out_dim: int = 4) -> MLP:
    """Changes of a box that start at none."""
    head = MLP(dim, dim, out_dim, 3)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head
