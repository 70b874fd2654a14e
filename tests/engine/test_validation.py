import copy

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from dset_d2.engine.validation import validation_loader, validation_losses

from ..conftest import in_two_processes, make_inputs, sparse_model, tiny_model

BATCHES = [make_inputs([(64, 96)] * 2), make_inputs([(64, 64)], seed=1)]


def test_losses_are_those_of_training():
    model = tiny_model(num_denoising=0)
    losses = validation_losses(model, BATCHES)
    wanted = []
    for batch in BATCHES:
        trained = copy.deepcopy(model).train()
        for module in trained.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        wanted.append({k: v.item() for k, v in trained(batch).items()})
    total = losses.pop("total_loss")
    assert losses.keys() == wanted[0].keys() and total == pytest.approx(sum(losses.values()))
    for name, value in losses.items():
        assert value == pytest.approx((2 * wanted[0][name] + wanted[1][name]) / 3, abs=1e-5)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "averaged"])
def test_nothing_learns(mode):
    model = sparse_model().train(mode)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    with EventStorage() as storage:
        first, again = (validation_losses(model, BATCHES) for _ in range(2))
        assert not storage.histories()
    assert first == again and any("_dn_" in name for name in first)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes and not model.clock.due
    assert all(p.grad is None for p in model.parameters())


def identity(dataset_dict: dict) -> dict:
    return dataset_dict


def validate(rank: int) -> None:
    images = make_inputs([(64, 96)] * 3)
    loader = validation_loader(images, identity, batch_size=1, num_workers=0)
    assert len(loader) == 2  # four images for three, so that nobody waits in vain
    losses = validation_losses(tiny_model(num_denoising=0), loader)
    assert bool(losses) == comm.is_main_process() and ("total_loss" in losses) == (rank == 0)


def test_two_processes_share_the_images():
    in_two_processes(validate)
