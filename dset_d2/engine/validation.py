"""The losses of a model on annotated images that it is not trained on."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.data import build_detection_test_loader
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..modeling import MetaArch


def validation_loader(
    dataset: Sequence[dict], mapper: Callable, batch_size: int, num_workers: int
) -> Iterable[list[dict]]:
    """The batches of this process.

    All processes have equally many images, for their losses wait for each other: some begin again
    with the first ones.

    Args:
        mapper: gives ``instances``, too.
    """
    processes = comm.get_world_size()
    length = -(-len(dataset) // processes) * processes
    sampler = [i % len(dataset) for i in range(comm.get_rank(), length, processes)]
    return build_detection_test_loader(
        dataset, mapper=mapper, sampler=sampler, batch_size=batch_size, num_workers=num_workers
    )


@contextmanager
def not_learning(model: MetaArch) -> Iterator[None]:
    """Let a model give all losses of training while it learns nothing.

    Its parts are in training mode, for which the decoder puts out what losses need; but not its
    norms, dropout, and the model itself, which would count a step.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm | _DropoutNd):
            module.eval()
    model.training = False
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        # Noisy queries are the same each time; and training goes on as if there were none.
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def validation_losses(model: MetaArch, loader: Iterable[list[dict]]) -> dict[str, float]:
    """Mean of each weighted loss over the images of all processes, under its name in training.

    Returns:
        ``total_loss``, too; on processes other than the first, nothing.
    """
    sums: dict[str, Any] = defaultdict(float)  # tensors, which wait for the end
    images = 0
    # In a storage of its own, as what sparse parts log is not of training.
    with not_learning(model), EventStorage():
        for batch in loader:
            inputs, padding = model.preprocess(batch)
            losses = model.compute_losses(inputs, [model.target(x) for x in batch], padding)
            for name, loss in losses.items():
                sums[name] += loss * len(batch)
            images += len(batch)
    means: dict[str, float] = defaultdict(float)
    gathered = comm.gather({name: float(value) / images for name, value in sums.items()})
    for own in gathered:
        for name, value in own.items():
            means[name] += value / len(gathered)
    return {"total_loss": sum(means.values()), **means} if gathered else {}
