"""Lengths of COCO runs."""

IMAGES = 118287
OTHER_SCALES = [480, 512, 544, 576, 608, 672, 704, 736, 768, 800]
SCALES = OTHER_SCALES + [640] * 3


def train_for(epochs, plain_epochs, warmup_iters, train, dataloader, model, lr_multiplier):
    """Set a run's length, and what moves with it; its last epochs see images as they are, at one
    size."""
    train.update(epochs=epochs, images=IMAGES)
    steps = epochs * round(IMAGES / dataloader.train.total_batch_size)
    lr_multiplier.warmup_iters = f"${{part_of_run:{warmup_iters},{steps}}}"
    end = f"${{part_of_run:{epochs - plain_epochs},{epochs}}}"
    dataloader.strong_augmentation_end = model.multi_scale_end = end
