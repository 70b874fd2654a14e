"""Lengths of COCO runs: epochs * images / batch."""

EPOCH = 118287 // 16
SCALES = [480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800]


def train_for(epochs, plain_epochs, train, dataloader, model):
    """Set a run's length; its last epochs see images as they are, at one size."""
    train.max_iter = epochs * EPOCH
    train.eval_period = train.checkpointer.period = EPOCH
    dataloader.strong_augmentation_end = (epochs - plain_epochs) * EPOCH
    model.multi_scale_end = (epochs - plain_epochs) * EPOCH
