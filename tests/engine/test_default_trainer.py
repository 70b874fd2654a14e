"""The README's lines for Detectron2's DefaultTrainer: they train, evaluate and resume."""

import json
import logging

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts

import dset_d2
from dset_d2.clock import shared_step
from dset_d2.data import DETRMapper, Mosaic
from dset_d2.synthetic import write_dataset

from ..test_configs import ROOT

DENSE = "configs/rtdetr/rtdetrv2_r18_coco.yaml"
SPARSE = "projects/dset/configs/dset_r18_dair_v2x.yaml"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    write_dataset(root, num_train=4, num_val=2, height=64, width=96, seed=1, progress=False)
    return root


@pytest.fixture
def trainer_class(datasets, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "detectron2")  # else the trainer sets loggers up for good
    monkeypatch.setattr(shared_step, "value", 0)  # and the process's count is left as it was
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    (code,) = [x for x in (ROOT / "README.md").read_text().split("```") if "DefaultTrainer)" in x]
    definitions, run, _ = code.removeprefix("python").partition("\ncfg = get_cfg()")
    assert run
    names: dict = {}
    exec(definitions, names)
    return names["Trainer"]


def tiny_cfg(file: str, output, max_iter: int) -> CfgNode:
    cfg = get_cfg()
    dset_d2.add_detr_config(cfg)
    cfg.merge_from_file(str(ROOT / file))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ENCODER.update(HIDDEN_DIM=32, DIM_FEEDFORWARD=64)
    cfg.MODEL.DECODER.update(HIDDEN_DIM=32, DIM_FEEDFORWARD=64, NUM_QUERIES=20, NUM_CLASSES=8)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("dair_v2x_i_train",), ("dair_v2x_i_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.IMAGE_SIZE = [64, 64]
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER = max_iter
    cfg.TEST.EVAL_PERIOD = 0  # at the end
    cfg.OUTPUT_DIR = str(output)
    return cfg


@pytest.mark.parametrize("file", [DENSE, SPARSE])
def test_trains_evaluates_and_resumes(trainer_class, file, tmp_path):
    trainer = trainer_class(tiny_cfg(file, tmp_path, max_iter=2))
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert len(rates) == (1 if file == DENSE else 2)  # rules make the second
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == {0.0, 1e-4}
    trainer.resume_or_load(resume=False)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    assert trainer.model.clock.step == 2
    written = (tmp_path / "metrics.json").read_text().splitlines()
    assert any("bbox/AP50" in json.loads(line) for line in written)

    again = trainer_class(tiny_cfg(file, tmp_path, max_iter=3))
    again.resume_or_load(resume=True)
    assert again.start_iter == 2 and again.model.clock.step == 2
    resumed = again.model.state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(resumed[name], value), name
    again.train()
    assert again.model.clock.step == 3
    assert "bbox" in trainer_class.test(again.cfg, again.model)


def test_loader_of_a_mosaic(trainer_class, tmp_path):
    cfg = tiny_cfg(SPARSE, tmp_path, max_iter=2)
    cfg.INPUT.MOSAIC.PROB, cfg.INPUT.STRONG_AUGMENTATION_END = 1.0, 10**6
    mosaic = Mosaic(cfg, get_detection_dataset_dicts(cfg.DATASETS.TRAIN, False))
    assert len(mosaic) == 4 and "composition" in mosaic[0]
    mapper = DETRMapper(cfg, is_train=True)
    batch = next(iter(build_detection_train_loader(cfg, dataset=mosaic, mapper=mapper)))
    assert [tuple(x["image"].shape) for x in batch] == [(3, 64, 64)] * 2
