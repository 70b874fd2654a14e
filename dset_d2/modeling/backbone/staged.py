"""What the convolutional backbones share: four stages, some of whose outputs are features."""

from collections.abc import Sequence

from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone
from torch import Tensor, nn

from ..layers import check_choice


class StagedBackbone(Backbone):
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
        if freeze_norm:
            FrozenBatchNorm2d.convert_frozen_batchnorm(self)
