"""What the decoders share: the choice of queries, denoising, and the grouping of their outputs."""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..layers import MLP, check_choice, gather_tokens, projection, valid_tokens
from ..sparse import MemoryPruner, MemoryPruningConfig
from .denoising import Denoising, make_denoising
from .queries import make_anchors


class DETRDecoder(nn.Module):
    """Selects the encoder's best tokens as queries, which a subclass refines layer by layer.

    A subclass adds the layers, their heads and :meth:`refine`.

    Args:
        num_classes: number of object classes.
        in_channels: channels of the encoder's outputs, finest first.
        num_layers: decoder layers that are trained.
        eval_idx: layer whose output inference returns; negative counts from the last.
        num_points: sampling points per level.
        query_select_method: "default" (best class score) or "agnostic" (one objectness score).
        num_denoising: positives of the denoising part; 0 turns it off.
        memory_pruning: lets cross-attention read only the tokens with the best scores.
    """

    # Whether features that have the decoder's width already are projected all the same.
    project_always = True

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: tuple[int, ...],
        hidden_dim: int,
        num_layers: int,
        num_points: tuple[int, ...],
        num_queries: int = 300,
        eval_idx: int = -1,
        query_select_method: str = "default",
        num_denoising: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
        memory_pruning: MemoryPruningConfig | None = None,
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
        dropped: list[Tensor | None] | None = None,
    ) -> dict:
        """Detect.

        Args:
            features: (B, C_l, H_l, W_l) per level, finest first.
            targets: per image ``labels`` (n,) and ``boxes`` (n, 4) cx, cy, w, h in [0, 1];
                needed in training if denoising is on.
            valid_ratio: (B, 2) share of the padded width and height that each image fills.
            dropped: (B, H_l * W_l) bool per level, True where the encoder pruned a token that
                the decoder shall not read; None for all of a level, or of all levels, to be read.

        Returns:
            ``pred_logits`` (B, Q, C) and ``pred_boxes`` (B, Q, 4) cx, cy, w, h in [0, 1]; in
            training also ``aux_outputs`` (the earlier layers), ``enc_outputs`` (the selected
            tokens) and, with denoising, ``dn_outputs`` (all layers) and ``denoising``.
        """
        features = [project(x) for project, x in zip(self.input_proj, features)]
        shapes = [tuple(x.shape[2:]) for x in features]
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in features], dim=1)
        valid = readable(features, valid_ratio, dropped)
        content, reference, selected, best = self.select_queries(
            memory, make_anchors(shapes, memory.device, valid_ratio), valid
        )
        kept = None
        if self.memory_pruner is not None:
            kept = self.memory_pruner(best, least=content.shape[1])

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
            memory=memory if kept is None else gather_tokens(memory, kept),
            shapes=shapes,
            kept=kept,
            valid=valid,
            valid_ratio=valid_ratio,
        )
        return self.collect(layers, selected, denoising)

    def select_queries(
        self, memory: Tensor, anchors: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        """Content (B, Q, dim) and box logits (B, Q, 4) of the tokens with the best scores, their
        predictions, and the scores (B, N) of all tokens.

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
        return content.detach(), reference.detach(), selected, best.detach()

    def refine(
        self, content: Tensor, reference: Tensor, attn_mask: Tensor | None, **memory
    ) -> list[dict[str, Tensor]]:
        """Run the layers.

        Args:
            content: (B, Q, dim).
            reference: (B, Q, 4) boxes cx, cy, w, h in [0, 1].
            attn_mask: (Q, Q) bool, True where attention is blocked.
            memory: what :class:`MSDeformableAttention` reads.

        Returns:
            The predictions of all layers in training, else those of one.
        """
        raise NotImplementedError

    def collect(
        self,
        layers: list[dict[str, Tensor]],
        selected: dict[str, Tensor],
        denoising: Denoising | None,
    ) -> dict:
        """Sort the layers' predictions into the groups that the criterion knows."""
        outputs = {}
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


def readable(
    features: list[Tensor], valid_ratio: Tensor | None, dropped: list[Tensor | None] | None
) -> Tensor | None:
    """(B, N) bool of the tokens of all levels that are neither padding nor dropped; None: all."""
    dropped = dropped or [None] * len(features)
    if valid_ratio is None and all(mask is None for mask in dropped):
        return None
    levels = []
    for x, mask in zip(features, dropped):
        valid = torch.ones(len(x), x.shape[2] * x.shape[3], dtype=torch.bool, device=x.device)
        if valid_ratio is not None:
            valid = valid_tokens(valid_ratio, *x.shape[2:])
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
