"""What backbones share: a warning if they are fine-tuned from random weights; what convolutional
ones share: four stages, some of whose outputs are features."""

import logging
from collections.abc import Sequence

from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import check_choice

logger = logging.getLogger(__name__)


class PretrainedBackbone(Backbone):
    """A backbone that is meant to start from pretrained weights.

    Attributes:
        pretrained_file: which file holds such weights.
        fine_tuned: whether it is partly frozen, or trained at a lower rate than the rest (which
            :func:`dset_d2.engine.optimizer.parameter_groups` finds out).
        checked: whether training has begun.
    """

    pretrained_file: str
    fine_tuned = False
    checked = False

    def is_fresh(self) -> bool:
        """Whether no weights were loaded, and none trained."""
        raise NotImplementedError

    def check_start(self) -> None:
        """Warn of fine-tuning from random weights; to be called first in each forward.

        Before the first forward in training mode it is not known what a launcher will load.
        """
        if self.checked or not self.training:
            return
        self.checked = True
        if self.fine_tuned and self.is_fresh():
            logger.warning(
                "The backbone is fine-tuned (partly frozen, or slower than the rest) but its "
                "weights are random: start from pretrained ones, train.init_checkpoint=FILE, such "
                "as %s",
                self.pretrained_file,
            )


class ConvBackbone(PretrainedBackbone):
    """A stem of stride 4 and four stages, of strides 4, 8, 16 and 32."""

    stage_names: tuple[str, ...]

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
        self.fine_tuned = freeze_norm or freeze_at >= 0
        if freeze_norm:
            FrozenBatchNorm2d.convert_frozen_batchnorm(self)

    def is_fresh(self) -> bool:
        """Whether all norms still have the means that they start from."""
        norms = (m for m in self.modules() if isinstance(m, _BatchNorm | FrozenBatchNorm2d))
        return not any(bool(norm.running_mean.any()) for norm in norms)
