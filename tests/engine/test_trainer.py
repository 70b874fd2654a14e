"""Batches in parts, and mixed precision."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage

from dset_d2.engine.trainer import Trainer
from dset_d2.modeling import MetaArch

from ..conftest import make_inputs, sparse_model, tiny_model

BOXES = {"some empty": (3, 1, 0, 0), "all": (3, 1, 2, 4)}  # per image


def build(**decoder) -> MetaArch:
    """Without noise; norms that see a part each, or balance, would differ."""
    return tiny_model(num_denoising=0, **decoder).train()


def still(model: MetaArch) -> MetaArch:
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def step(model: MetaArch, batch: list[dict], **settings) -> tuple[dict, dict, Trainer]:
    """One step of plain gradient descent: its losses, gradients and trainer."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, [batch], optimizer, **settings)
    still(model)
    with EventStorage() as trainer.storage:
        trainer.iter = 0
        trainer.run_step()
        losses = {k: v[0] for k, v in trainer.storage.latest().items() if "loss" in k}
    return losses, {n: p.grad for n, p in model.named_parameters()}, trainer


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
def test_parts_give_the_gradients_of_the_whole_batch(boxes):
    batch = [make_inputs([(64, 96)], n, seed=i)[0] for i, n in enumerate(boxes)]
    model = build()
    losses, wanted, _ = step(model, batch)
    for parts in (2, 4):
        in_parts, gradients, trainer = step(model, batch, accumulate=parts)
        assert in_parts == pytest.approx(losses, rel=1e-5)
        largest = max(float(g.abs().max()) for g in wanted.values() if g is not None)
        for name, gradient in wanted.items():
            if gradient is not None:
                error = (gradients[name] - gradient).abs().max()
                assert error <= 1e-5 * largest, name
        assert trainer.model.clock.step == 1  # one step, whatever forwards it took


def test_sparse_and_dfine_models_train_in_parts():
    """Balance and distillation see a part each: near the whole batch's, not equal."""
    batch = make_inputs([(64, 96)] * 4)
    models = [sparse_model(decoder={"num_denoising": 0}).train()]
    models += [tiny_model("configs/dfine/dfine_s_coco.py", num_denoising=0).train()]
    for model in models:
        losses, _, _ = step(model, batch)
        in_parts, gradients, trainer = step(model, batch, accumulate=2)
        assert in_parts["total_loss"] == pytest.approx(losses["total_loss"], rel=0.02)
        assert all(g.isfinite().all() for g in gradients.values() if g is not None)
        assert trainer.model.clock.step == 1


def test_batch_without_equal_parts():
    with pytest.raises(ValueError, match="batch of 3 images has no 2 equal parts"):
        step(build(), make_inputs([(64, 96)] * 3), accumulate=2)


def test_mixed_precision_on_a_cpu_is_bfloat16(monkeypatch):
    seen = []
    monkeypatch.setattr(
        MetaArch, "preprocess", lambda self, inputs: seen.append(torch.is_autocast_enabled("cpu"))
    )
    for amp in (True, False):
        with pytest.raises(TypeError):  # preprocess gives nothing to go on with
            step(build(), make_inputs([(64, 96)]), amp=amp)
    assert seen == [True, False]
