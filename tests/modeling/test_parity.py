"""Outputs and losses of the released upstream code, on weights that both sides can make.

``tests/fixtures/*.npz`` holds upstream's numbers; ``fill.py`` makes the weights and inputs.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

import dset_d2
from dset_d2.checkpoint import load_upstream

from ..fixtures import fill

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = {
    "rtdetr_r18vd_6x_coco": "configs/rtdetr/rtdetrv2_r18_coco.py",  # v1: the same network
    "rtdetrv2_r18vd_120e_coco": "configs/rtdetr/rtdetrv2_r18_coco.py",
    "rtdetrv2_r34vd_120e_coco": "configs/rtdetr/rtdetrv2_r34_coco.py",
    "dfine_hgnetv2_n_coco": "configs/dfine/dfine_n_coco.py",
    "dfine_hgnetv2_s_coco": "configs/dfine/dfine_s_coco.py",
}
COCO_IDS = np.array([c["id"] for c in COCO_CATEGORIES if c["isthing"]])


def made_weights(meta: dict) -> dict[str, torch.Tensor]:
    state = {}
    for name, shape in meta["state_dict"].items():
        if name.endswith("num_batches_tracked") or any(part in name for part in meta["skip"]):
            state[name] = torch.zeros(shape)
        else:
            state[name] = torch.from_numpy(fill.array(name, shape, meta["salt"]))
    return state


@pytest.fixture(scope="module", params=CASES)
def case(request):
    expected = np.load(FIXTURES / f"{request.param}.npz")
    meta = json.loads(str(expected["meta"]))
    model = instantiate(dset_d2.get_config(CASES[request.param]).model)
    load_upstream(model, {"ema": {"module": made_weights(meta)}, "last_epoch": 0})
    return model.eval(), expected, meta


@pytest.fixture(scope="module")
def outputs(case):
    model, _, _ = case
    images = torch.from_numpy(fill.image(1, 640, 640))
    with torch.no_grad():
        features = model.backbone(images)
        features = [features[name] for name in model.encoder.in_features]
        encoded = model.encoder(features).features
        return features, encoded, model.predict(images)


def test_parameter_count(case):
    model, _, meta = case
    assert sum(p.numel() for p in model.parameters()) == meta["params"]


def test_features(case, outputs):
    _, expected, _ = case
    for name, levels in zip(("backbone", "encoder"), outputs):
        for index, level in enumerate(levels):
            sample = level[:, :8, ::4, ::4].numpy()
            np.testing.assert_allclose(sample, expected[f"{name}{index}"], rtol=0, atol=1e-4)


def share_found(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of their rows that one of our rows equals to 1e-4; near-ties may change places."""
    distance = np.abs(ours[:, None] - theirs[None]).max(-1)
    return (distance.min(0) < 1e-4).mean()


def test_predictions(case, outputs):
    _, expected, _ = case
    ours = np.concatenate([x[0].numpy() for x in outputs[2].values()], axis=1)
    theirs = np.concatenate([expected["pred_logits"][0], expected["pred_boxes"][0]], axis=1)
    assert share_found(ours, theirs) >= 0.99


def test_postprocess(case, outputs):
    model, expected, _ = case
    found = model.postprocess(outputs[2], [(1080, 1920)])[0]
    assert found.image_size == (1080, 1920)
    scale = np.array([1920, 1080, 1920, 1080])
    np.testing.assert_allclose(found.scores.numpy(), expected["post_scores"], rtol=0, atol=1e-4)

    def rows(scores, labels, boxes):
        return np.concatenate([scores[:, None], labels[:, None], boxes / scale], axis=1)

    # Upstream speaks of COCO's category ids, Detectron2 of contiguous ones.
    labels = COCO_IDS[found.pred_classes.numpy()]
    ours = rows(found.scores.numpy(), labels, found.pred_boxes.tensor.numpy())
    names = ("post_scores", "post_labels", "post_boxes")
    assert share_found(ours, rows(*(expected[name] for name in names))) >= 0.99


def test_losses(case):
    model, _, meta = case
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    model.decoder.num_denoising = 0
    targets = [
        {"labels": torch.from_numpy(labels), "boxes": torch.from_numpy(boxes)}
        for labels, boxes in fill.targets(2, 80)
    ]
    with torch.no_grad():
        losses = model.compute_losses(torch.from_numpy(fill.image(2, 640, 640, seed=3)), targets)
    # RT-DETR v1 counts the encoder's boxes as those of one more layer.
    last = f"_aux_{len(model.decoder.decoder.layers) - 1}"
    expected = {name.replace(last, "_enc_0"): value for name, value in meta["losses"].items()}
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-4), name
