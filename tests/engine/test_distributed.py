"""Two processes give the loss and the gradients of one with the joined batch."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dset_d2.engine.ema import ModelEMA
from dset_d2.engine.hooks import StatisticsHook
from dset_d2.modeling import SupernetConfig

from ..conftest import (
    in_two_processes,
    make_inputs,
    sparse_model,
    tiny_dinov3,
    tiny_grounding,
    tiny_model,
)

# Without noise denoising is deterministic; its layout depends on the largest box count.
# Boxes per image on either process.
COUNTS = [(3, 5), (0, 4), (0, 0)]
PLAIN = dict(num_denoising=12, label_noise_ratio=0.0, box_noise_scale=0.0)


def supernet(**settings) -> torch.nn.Module:
    model = tiny_dinov3(freeze=None)
    for name, value in PLAIN.items():
        setattr(model.decoder, name, value)
    # One block of the ViT runs in a step or not.
    model.supernet = SupernetConfig(vit_blocks=(5,), num_queries=(10, 20), **settings)
    return model


MODELS = {
    "dense": lambda: tiny_model(**PLAIN),
    "dfine": lambda: tiny_model("configs/dfine/dfine_s_coco.py", **PLAIN),
    "grounding": lambda: tiny_grounding("mm-grounding-dino"),
    "sandwich": lambda: supernet(sampling="sandwich"),
    "one random setting": supernet,
    "sparse": lambda: sparse_model(decoder=PLAIN, spatial_prior="flat", diversity_weight=0.1),
}


def build(name: str) -> torch.nn.Module:
    """In training mode but for BatchNorm, whose statistics are each process's own."""
    model = MODELS[name]().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def batches(counts: tuple[int, int]) -> list[list[dict]]:
    return [make_inputs([(64, 96)] * 2, n, seed=i) for i, n in enumerate(counts)]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}


def train_norms(rank: int) -> dict[str, list[dict]]:
    """States of norms and of their average before and after the hook, whose period is 2 steps.

    Each process has its own data, but for the last norm, which does not learn.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.BatchNorm2d(3) for _ in range(3))).train()
    model[2].eval().running_mean.fill_(0.1)
    ema = ModelEMA(model, decay=0.5, warmup=1)
    hook = StatisticsHook([0, 2], model, ema)
    states = {"model": [], "average": []}
    for step in range(2):
        model(torch.randn(4, 3, 5, 5) * (rank + 1) + rank)
        ema.update(model)
        hook.trainer = SimpleNamespace(iter=step, max_iter=9)
        for call in (lambda: None, hook.after_step):
            call()
            for name, module in (("model", model), ("average", ema.module)):
                states[name].append({k: v.clone() for k, v in module.state_dict().items()})
    return states


def worker(rank: int, folder: str) -> None:
    torch.save(train_norms(rank), f"{folder}/norms{rank}.pt")
    for name in MODELS:
        model = DistributedDataParallel(build(name))
        for counts in [*COUNTS, COUNTS[0]]:  # a step fails if the one before left a gradient out
            model.zero_grad()
            total = sum(model(batches(counts)[rank]).values())
            total.backward()
            dist.all_reduce(total.detach_())
            found = {"loss": total / 2, "gradients": gradients(model)}
            torch.save(found, f"{folder}/{name}{rank}{counts}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    in_two_processes(worker, str(folder))
    return folder


@pytest.mark.parametrize("name", ["model", "average"])
def test_statistics_are_averaged_where_they_are_due(results, name):
    ranks = [torch.load(results / f"norms{rank}.pt", weights_only=True)[name] for rank in range(2)]
    for before, after, before_due, after_due in [ranks[0], ranks[1]]:
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        for key, value in after_due.items():
            mean = (ranks[0][2][key] + ranks[1][2][key]) / 2
            torch.testing.assert_close(value, mean.to(value.dtype), msg=key)
        assert not torch.equal(after_due["0.running_mean"], before_due["0.running_mean"])
        assert torch.equal(after_due["2.running_mean"], torch.full((3,), 0.1))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the two processes have: more would add up in another order, which shows in gradients that
    nearly cancel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_equal_one(results, one_thread, name, counts):
    model = build(name)
    total = sum(model(sum(batches(counts), [])).values())
    total.backward()
    expected = gradients(model)
    for rank in range(2):
        found = torch.load(results / f"{name}{rank}{counts}.pt", weights_only=True)
        torch.testing.assert_close(found["loss"], total.detach(), rtol=1e-5, atol=1e-6)
        assert found["gradients"].keys() == expected.keys()
        for key, value in found["gradients"].items():
            assert (value is None) == (expected[key] is None), key
            if key.endswith(".key.bias"):
                # It moves all scores of a query alike: what is there of a gradient is rounding.
                assert max(value.abs().max(), expected[key].abs().max()) < 1e-7, key
            elif value is not None:
                scale = expected[key].abs().max().clamp(min=1e-6)
                assert (value - expected[key]).abs().max() / scale < 1e-3, key
