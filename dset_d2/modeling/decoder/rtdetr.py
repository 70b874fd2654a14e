"""Decoder of RT-DETR (https://arxiv.org/abs/2304.08069) and RT-DETRv2
(https://arxiv.org/abs/2407.17140)."""

from torch import Tensor

from ..layers import inverse_sigmoid
from ..registry import DECODER_REGISTRY
from .base import DETRDecoder
from .deformable_attention import Memory


@DECODER_REGISTRY.register()
class RTDETRDecoder(DETRDecoder):
    """Refines boxes as logits, each layer from the box of the one before."""

    criterion = "SetCriterion"

    def refine(
        self, content: Tensor, reference: Tensor, attn_mask: Tensor | None, memory: Memory
    ) -> list[dict[str, Tensor]]:
        layers, last = [], self.last_layer()
        previous = None
        for index, layer in enumerate(self.decoder.layers):
            position = self.query_pos_head(reference)
            content = layer(content, reference, position, attn_mask, memory)
            delta = self.dec_bbox_head[index](content).float()
            refined = (delta + inverse_sigmoid(reference)).sigmoid()
            if self.training:
                # Gradients of layer i reach the box head of layer i - 1 through its box.
                full = refined
                if previous is not None:
                    full = (delta + inverse_sigmoid(previous)).sigmoid()
                logits = self.dec_score_head[index](content)
                layers.append({"pred_logits": logits, "pred_boxes": full})
            elif index == last:
                logits = self.dec_score_head[index](content)
                return [{"pred_logits": logits, "pred_boxes": refined}]
            previous, reference = refined, refined.detach()
        return layers
