"""Training in phases: what has a gradient, what moves, and what survives DDP, EMA and a resume.

Detectron2's own trainer runs all of it; the only hook that training takes is its schedule's.
"""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.engine.defaults import create_ddp_model

from dset_d2.engine.ema import ModelEMA
from dset_d2.engine.hooks import EMAHook
from dset_d2.engine.optimizer import (
    UnfreezingDrops,
    build_adamw,
    flat_cosine,
    parameter_groups,
    warmup_constant,
)
from dset_d2.modeling import FreezeConfig, LoRAConfig, forward_context
from dset_d2.modeling.sparse import MoEConfig, ViTPruningConfig

from ..conftest import in_two_processes, make_inputs, tiny_dinov3

VIT = "backbone.dinov3."
STEPS, UNFREEZE = 5, 2
TRAINED = tuple(f"{VIT}blocks.{i}." for i in (2, 3, 4, 5)) + (f"{VIT}norm.",)
PHASES = {"freeze": {"unfreeze_step": UNFREEZE, "unfreeze_blocks": 4}}


# The last three blocks one by one, from steps 1, 3 and 5 on; the final norm with the last one.
LAYERED = {"freeze": {"unfreeze_step": 1, "unfreeze_blocks": 3, "unfreeze_every": 2}}
LAYERED_STEPS = 6

# Two places at which the ratio falls, or is drawn; experts in a block that is trained later.
SPARSE = {
    "pruning": [
        ViTPruningConfig(block=1, keep_ratio=0.5, min_tokens=2, end_step=3),
        ViTPruningConfig(block=4, keep_ratio=0.25, min_tokens=2, random_ratio=True),
    ],
    "moe": MoEConfig(num_experts=2, layers=(3,)),
}
SCORERS = {
    f"backbone.pruners.{block}.scorer.layers.{layer}.{kind}"
    for block in (1, 4)
    for layer in (0, 1)
    for kind in ("weight", "bias")
}


class Batches:
    """Batches by step, and random numbers by step, so that a resumed run repeats them."""

    def __init__(self, first: int = 0, rank: int = 0) -> None:
        self.first, self.rank = first, rank

    def __iter__(self):
        for step in range(self.first, 100):
            torch.manual_seed(step)
            yield make_inputs([(64, 96)], num_classes=5, seed=2 * step + self.rank)


def make_trainer(model, first: int = 0, rank: int = 0) -> SimpleTrainer:
    plain = getattr(model, "module", model)
    # A strong decay would show in a parameter that is only multiplied by zero gradients.
    rules = {"vit": {"pattern": r"^backbone\.dinov3\.", "factor": 0.1}}
    params = parameter_groups(plain, base_lr=1e-2, weight_decay=0.5, rules=rules)
    optimizer = build_adamw(params, lr=1e-2, weight_decay=0.5)
    trainer = SimpleTrainer(model, Batches(first, rank), optimizer)
    freeze = plain.backbone.phases.config
    if freeze is not None and freeze.unfreeze_every:
        flat = warmup_constant(LAYERED_STEPS, warmup_iters=0)
        schedule = UnfreezingDrops(flat, LAYERED_STEPS, freeze, last=0.125)
    else:
        schedule = flat_cosine(max_iter=STEPS, warmup_iters=1, flat=0.5, floor=0.5)
    trainer.register_hooks([hooks.LRScheduler(scheduler=schedule)])
    return trainer


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that no checkpoint holds as well."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def moved(before: dict, after: dict, prefix: str = VIT) -> set[str]:
    return {k for k in before if k.startswith(prefix) and not torch.equal(before[k], after[k])}


def trained_later(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(TRAINED)}


class Watch(HookBase):
    """Calls a function after every step."""

    def __init__(self, function) -> None:
        self.function = function

    def after_step(self) -> None:
        self.function()


@pytest.fixture(scope="module")
def whole_run() -> tuple[list[dict], list[dict]]:
    """Parameters and buffers before and after each step, and checkpoints after each."""
    model = tiny_dinov3(**PHASES)
    trainer = make_trainer(model)
    snapshots, checkpoints = [snapshot(model)], []

    def watch() -> None:
        snapshots.append(snapshot(model))
        states = {"model": model.state_dict(), "trainer": trainer.state_dict()}
        checkpoints.append(copy.deepcopy(states))

    trainer.register_hooks([Watch(watch)])
    trainer.train(0, STEPS)
    return snapshots, checkpoints


@pytest.fixture(scope="module")
def run(whole_run) -> list[dict[str, torch.Tensor]]:
    return whole_run[0]


def test_phase_a_moves_nothing_of_the_vit(run):
    for after in run[1 : UNFREEZE + 1]:
        assert not moved(run[0], after)
    assert any("adapter.sta" in name for name in moved(run[0], run[1], "backbone.adapter."))
    assert moved(run[0], run[1], "encoder.") and moved(run[0], run[1], "decoder.")


def test_phase_b_moves_the_last_blocks_alone(run):
    later = {name for name in run[0] if name.startswith(TRAINED) and not name.endswith("k_bias")}
    assert len(later) == 4 * 15 + 2
    assert moved(run[UNFREEZE], run[UNFREEZE + 1]) == later
    assert moved(run[0], run[-1]) == later


def test_gradients_and_moments():
    model = tiny_dinov3(**PHASES)
    trainer = make_trainer(model)
    names = {id(p): name for name, p in model.named_parameters()}
    steps = []

    def watch() -> None:
        found = {name for name, p in model.named_parameters() if p.grad is not None}
        state = {names[id(p)]: int(s["step"]) for p, s in trainer.optimizer.state.items()}
        steps.append(({name for name in found if name.startswith(VIT)}, state))

    trainer.register_hooks([Watch(watch)])
    trainer.train(0, STEPS)
    for found, state in steps[:UNFREEZE]:
        assert not found
        assert not any(name.startswith(VIT) for name in state)
    for index, (found, state) in enumerate(steps[UNFREEZE:]):
        assert found == trained_later(model)
        # Moments start with the phase, and so does the correction of their bias.
        assert {state[name] for name in found} == {index + 1}


def test_the_vit_has_its_own_rate():
    model = tiny_dinov3(**PHASES)
    optimizer = make_trainer(model).optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == pytest.approx(1e-3 if name.startswith(VIT) else 1e-2), name


def modes(module: torch.nn.Module) -> set[bool]:
    return {m.training for m in module.modules()}


def test_frozen_blocks_stay_in_evaluation_mode():
    model = tiny_dinov3(**PHASES)
    vit = model.backbone.dinov3
    assert modes(model.train().backbone.dinov3) == {False}
    assert modes(model.backbone.adapter) == {True}
    trainer = make_trainer(model)
    trainer.train(0, UNFREEZE)
    assert modes(vit) == {False}
    assert modes(model.train().backbone.dinov3) == {False}
    trainer.train(UNFREEZE, UNFREEZE + 1)
    model.eval()
    assert modes(model.backbone) == {False}
    model.train()
    model(make_inputs([(64, 96)]))
    assert modes(vit.blocks[0]) == modes(vit.blocks[1]) == modes(vit.patch_embed) == {False}
    assert modes(vit.blocks[2]) == modes(vit.blocks[5]) == {True}


def test_frozen_blocks_do_not_drop_paths():
    features = []
    model = tiny_dinov3(vit=dict(drop_path_rate=0.9), **PHASES).train()
    image = torch.randn(1, 3, 64, 64)
    for step in (1, 1, UNFREEZE, UNFREEZE):
        with forward_context(step=step):
            features.append(model.backbone.maps(image)[-1])
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[2], features[3])


@pytest.mark.parametrize("stop", [1, UNFREEZE, UNFREEZE + 1])
def test_resumed_run_equals_an_uninterrupted_one(whole_run, stop):
    snapshots, checkpoints = whole_run
    saved = checkpoints[stop - 1]
    model = tiny_dinov3(**PHASES)
    trainer = make_trainer(model, first=stop)
    model.load_state_dict(saved["model"])
    trainer.load_state_dict(saved["trainer"])
    trainer.train(stop, STEPS)
    assert not moved(snapshots[-1], snapshot(model), "")


def test_averaged_weights():
    model = tiny_dinov3(**PHASES)
    start = snapshot(model)
    ema = ModelEMA(model, decay=0.5, warmup=1)
    trainer = make_trainer(model)
    trainer.register_hooks([EMAHook(ema, model)])
    trainer.train(0, UNFREEZE)
    assert not moved(start, snapshot(ema.module))
    trainer.train(UNFREEZE, STEPS)
    assert moved(start, snapshot(ema.module)) == trained_later(model)
    assert int(ema.module.clock.steps) == STEPS


def test_frozen_for_good_and_not_frozen_at_all():
    forever = tiny_dinov3(freeze={"unfreeze_step": None})
    optimizer = make_trainer(forever).optimizer
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in trained for p in forever.backbone.dinov3.parameters())
    free = tiny_dinov3(freeze=None)
    before = snapshot(free)
    make_trainer(free).train(0, 1)
    parameters = {name for name, _ in free.named_parameters() if name.startswith(VIT)}
    assert moved(before, snapshot(free)) == parameters


def test_scorers_are_trained_in_both_phases():
    model = tiny_dinov3(**PHASES, **SPARSE)
    snapshots, trainer = [snapshot(model)], make_trainer(model)
    trainer.register_hooks([Watch(lambda: snapshots.append(snapshot(model)))])
    trainer.train(0, STEPS)
    for step, (before, after) in enumerate(zip(snapshots, snapshots[1:])):
        assert moved(before, after, "backbone.pruners.") == SCORERS
        later = trained_later(model) if step >= UNFREEZE else set()
        assert moved(before, after) == later
    assert any("blocks.3.mlp.router" in name for name in trained_later(model))


def test_lora_is_trained_while_the_rest_is_dormant():
    model = tiny_dinov3(lora=LoRAConfig(rank=2, blocks=5), **PHASES)
    before = snapshot(model)
    trainer = make_trainer(model)
    trainer.train(0, UNFREEZE)
    updates = {name for name in before if ".lora_" in name}
    assert len(updates) == 5 * 2 * 2
    assert moved(before, snapshot(model)) == updates
    trainer.train(UNFREEZE, UNFREEZE + 1)
    assert moved(before, snapshot(model)) == updates | trained_later(model)


# Layer by layer.


def parts_trained(step: int) -> tuple[str, ...]:
    """Prefixes of what the run that is LAYERED trains of the ViT at a step."""
    begun = [index for index, start in ((5, 1), (4, 3), (3, 5)) if step >= start]
    return (f"{VIT}norm.",) * bool(begun) + tuple(f"{VIT}blocks.{index}." for index in begun)


def parameters_trained(model: torch.nn.Module, step: int) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.startswith(parts_trained(step) or ("-",))}


def test_blocks_are_trained_one_by_one_at_falling_rates():
    model = tiny_dinov3(**LAYERED)
    trainer = make_trainer(model)
    snapshots, counts, rates = [snapshot(model)], [], []

    def watch() -> None:
        snapshots.append(snapshot(model))
        found = {name for name, p in model.named_parameters() if p.grad is not None}
        counts.append(len({name for name in found if name.startswith(VIT)}))
        rates.append(max(group["lr"] for group in trainer.optimizer.param_groups))

    trainer._hooks.insert(0, watcher := Watch(watch))  # before the schedule sets the next rate
    watcher.trainer = trainer
    trainer.train(0, LAYERED_STEPS)
    parameters = {name for name, _ in model.named_parameters()}
    for step, (before, after) in enumerate(zip(snapshots, snapshots[1:])):
        assert moved(before, after) & parameters == parameters_trained(model, step), step
    assert counts == [0, 17, 17, 32, 32, 47]  # 15 of each block, 2 of the norm
    assert rates == pytest.approx([1e-2, 5e-3, 5e-3, 2.5e-3, 2.5e-3, 1.25e-3])


def test_modes_follow_the_blocks():
    model = tiny_dinov3(**LAYERED)
    vit = model.backbone.dinov3
    make_trainer(model).train(0, 4)
    assert [vit.blocks[index].training for index in (3, 4, 5)] == [False, True, True]
    assert vit.norm.training


@pytest.mark.parametrize("stop, settings", [(2, SPARSE), (3, {}), (4, SPARSE)])
def test_resumed_between_two_blocks(stop, settings):
    checkpoints, snapshots = [], []
    model = tiny_dinov3(**LAYERED, **settings)
    trainer = make_trainer(model)

    def watch() -> None:
        states = {"model": model.state_dict(), "trainer": trainer.state_dict()}
        checkpoints.append(copy.deepcopy(states))
        snapshots.append(snapshot(model))

    trainer.register_hooks([Watch(watch)])
    trainer.train(0, LAYERED_STEPS)
    model = tiny_dinov3(**LAYERED, **settings)
    trainer = make_trainer(model, first=stop)
    model.load_state_dict(checkpoints[stop - 1]["model"])
    trainer.load_state_dict(checkpoints[stop - 1]["trainer"])
    trainer.train(stop, LAYERED_STEPS)
    assert not moved(snapshots[-1], snapshot(model), "")


def test_drops_of_the_rate():
    freeze = FreezeConfig(unfreeze_step=300, unfreeze_blocks=4, unfreeze_every=100)
    flat = warmup_constant(max_iter=1000, warmup_iters=100)
    rates = UnfreezingDrops(flat, 1000, freeze, last=0.1)
    found = [rates(step / 1000) for step in (50, 299, 300, 399, 400, 500, 599, 600, 1000)]
    drop = 0.1**0.25
    expected = [0.5, 1, drop, drop, drop**2, drop**3, drop**3, 0.1, 0.1]
    assert found == pytest.approx(expected, abs=0.006)
    together = UnfreezingDrops(flat, 1000, FreezeConfig(unfreeze_step=300), last=0.1)
    assert [together(step / 1000) for step in (299, 300)] == pytest.approx([1, 0.1])
    for never in (None, FreezeConfig()):
        assert UnfreezingDrops(flat, 1000, never)(1.0) == 1
    with pytest.raises(ValueError, match=r"last=0 must lie in \(0, 1\]"):
        UnfreezingDrops(flat, 1000, freeze, last=0)


# Two processes.


def worker(rank: int, folder: str) -> None:
    for name, options in DISTRIBUTED.items():
        model = tiny_dinov3(**(PHASES | options))
        parallel = create_ddp_model(
            model, device_ids=None, broadcast_buffers=False, find_unused_parameters=False
        )
        trainer = make_trainer(parallel, rank=rank)
        snapshots = [snapshot(model)]
        trainer.register_hooks([Watch(lambda s=snapshots, m=model: s.append(snapshot(m)))])
        trainer.train(0, UNFREEZE + 2)
        torch.save(snapshots, f"{folder}/{name}{rank}.pt")


DISTRIBUTED = {
    "plain": {},
    "lora": {"lora": LoRAConfig(rank=2, blocks=5)},
    "checkpointing": {"gradient_checkpointing": True},
    "sparse": SPARSE,
    "layered": LAYERED,
    "layered_lora": LAYERED
    | {"lora": LoRAConfig(rank=2, blocks=5), "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def distributed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phases")
    in_two_processes(worker, str(folder))
    return folder


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_processes(distributed, name):
    ranks = [torch.load(distributed / f"{name}{rank}.pt", weights_only=True) for rank in range(2)]
    first = ranks[0]
    parameters = {k for k in first[0] if "running_" not in k and "num_batches" not in k}
    for a, b in zip(*ranks):  # different images, one model (but for BatchNorm's statistics)
        assert not moved(a, b, "") & parameters
    updates = {k for k in first[0] if ".lora_" in k}
    if name == "sparse":
        assert all(moved(a, b, "backbone.pruners.") == SCORERS for a, b in zip(first, first[1:]))
    if name.startswith("layered"):
        for step, (before, after) in enumerate(zip(first, first[1:])):
            prefixes = parts_trained(step)
            begun = {k for k in parameters if k.startswith(prefixes) and not k.endswith("k_bias")}
            assert moved(before, after) == updates | begun
        return
    later = {k for k in first[0] if k.startswith(TRAINED) and not k.endswith("k_bias")}
    assert moved(first[0], first[UNFREEZE]) == updates
    assert moved(first[UNFREEZE], first[UNFREEZE + 1]) == updates | later
    assert moved(first[0], first[-1]) == updates | later
