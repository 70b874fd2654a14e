"""Steps of training are steps of an optimizer, whatever loop makes them."""

import copy
import pickle

import pytest
import torch

from dset_d2.clock import ramp, shared_step
from dset_d2.data.augmentation import RandomZoomOut, UntilStep
from dset_d2.data.mosaic import Mosaic
from dset_d2.engine.ema import ModelEMA
from dset_d2.engine.optimizer import build_adamw, parameter_groups

from .conftest import make_targets, tiny_model


def losses(model: torch.nn.Module) -> torch.Tensor:
    return sum(model.compute_losses(torch.rand(1, 3, 64, 64), make_targets(1, 2)).values())


def test_ramp():
    assert [ramp(s, 10, 20, 1.0, 0.5) for s in (0, 10, 15, 20, 99)] == [1, 1, 0.75, 0.5, 0.5]
    assert ramp(0, 0, 0, 1.0, 0.5) == ramp(None, 10, 20, 1.0, 0.5) == 0.5


def ours(model: torch.nn.Module) -> torch.optim.Optimizer:
    return build_adamw(parameter_groups(model, 1e-3, 1e-4), 1e-3, 1e-4)


def plain(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3)


@pytest.mark.parametrize("make_optimizer", [ours, plain])
def test_an_optimizer_step_is_a_step_whatever_forwards_it_took(make_optimizer):
    model, other = tiny_model().train(), tiny_model().train()
    optimizer = make_optimizer(model)
    losses(other)
    for step in range(1, 4):
        for _ in range(step):
            losses(model).backward()
        assert model.clock.step == step - 1
        optimizer.step()
        assert model.clock.step == int(model.clock.steps) == step
    assert other.clock.step == 0
    other_optimizer = make_optimizer(other)
    other_optimizer.step()
    assert (model.clock.step, other.clock.step) == (3, 1)


def test_several_optimizers_of_one_forward_make_one_step():
    model = tiny_model().train()
    parts = [plain(part) for part in (model.encoder, model.decoder)]
    for step in range(1, 3):
        losses(model).backward()
        for optimizer in parts:
            optimizer.step()
        assert model.clock.step == step


def test_a_model_that_an_optimizer_gets_later_is_counted():
    first, second = tiny_model().train(), tiny_model().train()
    optimizer = plain(torch.nn.ModuleList([first, second]))
    for model in (first, second, second):
        losses(model).backward()
        optimizer.step()
    assert (first.clock.step, second.clock.step) == (1, 2)


def test_workers_follow_the_model_that_trains():
    """Also before its first step, when a run is resumed; and no other model that is loaded."""
    model, teacher = tiny_model().train(), tiny_model()
    optimizer = ours(model)
    state = model.state_dict()
    state["clock.steps"] = torch.tensor(7)
    model.load_state_dict(state)
    assert shared_step.value == model.clock.step == 7
    state["clock.steps"] = torch.tensor(900)
    teacher.load_state_dict(state)
    assert teacher.clock.step == 900 and shared_step.value == 7
    losses(model).backward()
    optimizer.step()
    assert shared_step.value == 8


def test_copies_and_averages_keep_the_count():
    model = tiny_model().train()
    optimizer = ours(model)
    ema = ModelEMA(model)
    losses(model).backward()
    optimizer.step()
    ema.update(model)
    assert ema.module.clock.step == 1
    after = copy.deepcopy(model)
    losses(after).backward()
    plain(after).step()
    assert (model.clock.step, after.clock.step) == (1, 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_what_follows_the_step_follow_it(copied, monkeypatch):
    follower = UntilStep(RandomZoomOut(prob=1.0), end=5)
    dataset = Mosaic([{"file_name": "a"}] * 4, end=5, prob=1.0)
    follower, dataset = copied(follower), copied(dataset)
    assert follower.step is dataset.step is shared_step
    assert "composition" in dataset[0]
    monkeypatch.setattr(shared_step, "value", 5)
    assert "composition" not in dataset[0]
