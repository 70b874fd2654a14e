import math

import pytest
import torch
from torch import nn

from dset_d2.engine.ema import ModelEMA


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


def test_follows_the_published_formula():
    model = small_model()
    ema = ModelEMA(model, decay=0.9, warmup=4)
    expected = None
    for update in range(1, 6):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1)
        ema.update(model)
        weight = model[0].weight.detach().clone()
        decay = 0.9 * (1 - math.exp(-update / 4))
        expected = weight if update == 1 else decay * expected + (1 - decay) * weight
        torch.testing.assert_close(ema.module[0].weight, expected)
    assert int(ema.module[1].num_batches_tracked) == 5
    assert 1 < float(ema.module[1].running_mean[0]) < 5
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())


def test_state_survives():
    model = small_model()
    ema = ModelEMA(model, decay=0.9, warmup=4)
    ema.update(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update(model)
    other = ModelEMA(small_model(), decay=0.9, warmup=4)
    other.load_state_dict(ema.state_dict())
    ema.update(model)
    other.update(model)
    torch.testing.assert_close(other.module.state_dict(), ema.module.state_dict())


def test_buffers_that_no_state_dict_holds_follow():
    model = small_model()
    model.register_buffer("table", torch.zeros(3), persistent=False)
    ema = ModelEMA(model)
    model.table += 1  # as weights that are loaded later do
    ema.update(model)
    assert torch.equal(ema.module.table, torch.ones(3))


def test_training_is_not_touched():
    model = small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ema = ModelEMA(model)
    ema.update(model)
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(("decay", "warmup"), [(1.0, 10), (-0.1, 10), (0.9, 0)])
def test_wrong_settings(decay, warmup):
    with pytest.raises(ValueError, match=f"decay={decay}"):
        ModelEMA(small_model(), decay, warmup)
