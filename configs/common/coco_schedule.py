"""Lengths of COCO runs: epochs * images / batch."""

IMAGES = 118287
OTHER_SCALES = [480, 512, 544, 576, 608, 672, 704, 736, 768, 800]
SCALES = OTHER_SCALES + [640] * 3


def train_for(epochs, plain_epochs, train, dataloader, model):
    """Set a run's length; its last epochs see images as they are, at one size."""
    epoch = IMAGES // dataloader.train.total_batch_size
    train.max_iter = epochs * epoch
    train.eval_period = train.checkpointer.period = train.epoch_iters = epoch
    dataloader.strong_augmentation_end = (epochs - plain_epochs) * epoch
    model.multi_scale_end = (epochs - plain_epochs) * epoch
