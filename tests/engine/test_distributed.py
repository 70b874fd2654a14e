"""Two processes give the loss and the gradients of one with the joined batch."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from ..conftest import make_inputs, tiny_model

# Without noise denoising is deterministic; its layout depends on the largest box count.
# Boxes per image on either process.
COUNTS = [(3, 5), (0, 4), (0, 0)]
PLAIN = dict(num_denoising=12, label_noise_ratio=0.0, box_noise_scale=0.0)


def build() -> torch.nn.Module:
    """In training mode but for BatchNorm, whose statistics are each process's own."""
    model = tiny_model(**PLAIN).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def batches(counts: tuple[int, int]) -> list[list[dict]]:
    return [make_inputs([(64, 96)] * 2, n, seed=i) for i, n in enumerate(counts)]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}


def worker(rank: int, folder: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for counts in COUNTS:
        model = DistributedDataParallel(build())
        for _ in range(2):  # the second step fails if the first left a gradient out
            model.zero_grad()
            total = sum(model(batches(counts)[rank]).values())
            total.backward()
        dist.all_reduce(total.detach_())
        found = {"loss": total / 2, "gradients": gradients(model)}
        torch.save(found, f"{folder}/{rank}{counts}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (str(folder), port), nprocs=2)
    return folder


@pytest.mark.parametrize("counts", COUNTS)
def test_two_processes_equal_one(results, counts):
    model = build()
    total = sum(model(sum(batches(counts), [])).values())
    total.backward()
    expected = gradients(model)
    for rank in range(2):
        found = torch.load(results / f"{rank}{counts}.pt", weights_only=True)
        torch.testing.assert_close(found["loss"], total.detach(), rtol=1e-5, atol=1e-6)
        assert found["gradients"].keys() == expected.keys()
        for name, value in found["gradients"].items():
            assert (value is None) == (expected[name] is None), name
            if value is not None:
                scale = expected[name].abs().max().clamp(min=1e-6)
                assert (value - expected[name]).abs().max() / scale < 1e-3, name
