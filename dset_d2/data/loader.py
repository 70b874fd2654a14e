"""The training loader."""

import logging
from collections.abc import Iterable, Mapping

from detectron2.data import build_detection_train_loader
from torch.utils.data import Dataset

from .mosaic import Mosaic

logger = logging.getLogger(__name__)


def build_train_loader(
    dataset: list[dict] | Dataset, *, mosaic: Mapping, **options
) -> Iterable[list[dict]]:
    """Detectron2's training loader, of a :class:`Mosaic` if one is asked for.

    Args:
        mosaic: settings of :class:`Mosaic`; there is none if ``prob`` and ``mixup_prob`` are 0.
        options: of :func:`~detectron2.data.build_detection_train_loader`.
    """
    if mosaic["prob"] or mosaic["mixup_prob"]:
        dataset = composed = Mosaic(dataset, **mosaic)
        if composed.end == 0:
            logger.warning("Mosaic and mixup end at training step 0: dataloader.mosaic.end is 0")
    return build_detection_train_loader(dataset, **options)
