"""Data sets, RT-DETR's augmentation and the loaders."""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator

from dset_d2.data.augmentation import (
    RandomIoUCrop,
    RandomPhotometric,
    RandomZoomOut,
    UntilStep,
)
from dset_d2.data.loader import build_train_loader
from dset_d2.data.mapper import DETRMapper

dataloader = dict(
    # Training step from which the strong augmentations are left out.
    strong_augmentation_end=0,
    image_size=[640, 640],  # height, width; images are stretched to it
    # Probabilities of an image of four, and of one of two that are blended; 0 leaves them out.
    mosaic=dict(prob=0.0, mixup_prob=0.0, end="${dataloader.strong_augmentation_end}"),
    train=L(build_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train", filter_empty=False),
        mapper=L(DETRMapper)(
            is_train=True,
            augmentations=[
                L(UntilStep)(
                    augmentation=L(RandomPhotometric)(prob=0.5),
                    end="${dataloader.strong_augmentation_end}",
                ),
                L(UntilStep)(
                    augmentation=L(RandomZoomOut)(prob=0.5),
                    end="${dataloader.strong_augmentation_end}",
                    on_mosaic=False,
                ),
                L(UntilStep)(
                    augmentation=L(RandomIoUCrop)(prob=0.8),
                    end="${dataloader.strong_augmentation_end}",
                    on_mosaic=False,
                ),
                L(T.RandomFlip)(),
                L(T.Resize)(shape="${dataloader.image_size}"),
            ],
        ),
        mosaic="${dataloader.mosaic}",
        total_batch_size=16,
        aspect_ratio_grouping=False,
        num_workers=4,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(DETRMapper)(
            is_train=False, augmentations=[L(T.Resize)(shape="${dataloader.image_size}")]
        ),
        num_workers=4,
    ),
    evaluator=L(COCOEvaluator)(
        dataset_name="${..test.dataset.names}",
        output_dir="${train.output_dir}",
        allow_cached_coco=False,
    ),
)
