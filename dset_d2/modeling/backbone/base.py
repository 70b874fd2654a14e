"""What the convolutional backbones share: four stages, some of whose outputs are features."""

import logging
from collections.abc import Sequence

from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone
from torch import Tensor, nn

from ..layers import check_choice

logger = logging.getLogger(__name__)


class ConvBackbone(Backbone):
    """A stem of stride 4 and four stages, of strides 4, 8, 16 and 32."""

    stage_names: tuple[str, ...]
    warned = False

    @property
    def size_divisibility(self) -> int:
        return 32

    def set_features(self, out_features: Sequence[str], channels: Sequence[int]) -> None:
        """Choose which stages' outputs are returned; ``channels`` are all stages'."""
        for name in out_features:
            check_choice("out_features", name, self.stage_names)
        self._out_features = list(out_features)
        self._out_feature_channels = dict(zip(self.stage_names, channels))
        self._out_feature_strides = dict(zip(self.stage_names, (4, 8, 16, 32)))

    def run_stages(self, x: Tensor, stages: Sequence[nn.Module]) -> dict[str, Tensor]:
        """(B, C, H / 4, W / 4) of the stem -> the chosen features by name."""
        if self.training and not self.warned:
            self.warned = True
            if self.is_fresh():
                logger.warning(
                    "The backbone's frozen norms were never trained: start from a checkpoint, see "
                    "train.init_checkpoint and dset_d2.tools.convert_checkpoint"
                )
        outputs = {}
        for name, stage in zip(self.stage_names, stages):
            x = stage(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    def freeze(self, parts: Sequence[nn.Module], freeze_at: int, freeze_norm: bool) -> None:
        """Stop training of the first ``freeze_at + 1`` parts, and of all norms if asked for."""
        for part in parts[: freeze_at + 1]:
            part.requires_grad_(False)
        if freeze_norm:
            FrozenBatchNorm2d.convert_frozen_batchnorm(self)

    def is_fresh(self) -> bool:
        """Whether there are frozen norms, and all still have the statistics they start from."""
        norms = [module for module in self.modules() if isinstance(module, FrozenBatchNorm2d)]
        return bool(norms) and not any(bool(norm.running_mean.any()) for norm in norms)
