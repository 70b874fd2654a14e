"""Detectors under budgets."""

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import Image

from dset_d2.budget import (
    BestStatic,
    DetectorSubject,
    LatencyTable,
    Outcomes,
    Space,
    measure_table,
    save_controller,
)
from dset_d2.inference import Predictor
from dset_d2.modeling import Knobs, SupernetConfig
from dset_d2.modeling.sparse import ViTPruningConfig
from dset_d2.tools import latency_table, visualize
from dset_d2.tools.common import build_model, read_config

from ..conftest import make_inputs, tiny_dinov3, tiny_model

SIZE = (128, 192)


def detector() -> torch.nn.Module:
    model = tiny_dinov3(pruning=[ViTPruningConfig(keep_ratio=1.0, block=2, min_tokens=2)]).eval()
    model.supernet = SupernetConfig(keep_ratio=(1.0, 0.5), decoder_layers=(3, 1))
    return model


def make_items(count: int) -> list[dict]:
    items = make_inputs([SIZE] * count)
    for item in items:
        instances = item.pop("instances")
        item["annotations"] = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": kind}
            for box, kind in zip(instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist())
        ]
    return items


@pytest.fixture(scope="module")
def subject() -> DetectorSubject:
    return DetectorSubject.of(detector(), SIZE, (1.0, 0.5))


def test_settings_are_scales_and_what_it_is_trained_for(subject):
    assert len(subject.settings) == 2 * 2 * 2
    assert subject.settings[0] == {"scale": 1.0, "keep_ratio": 1.0, "decoder_layers": 3}
    assert subject.shape(make_items(1)[0], subject.settings[0]) == "1x3x128x192"
    assert subject.shape(make_items(2), subject.settings[-1]) == "2x3x64x96"
    # Decoder layers learn by losses of their own in any training.
    plain = DetectorSubject.of(tiny_model(), SIZE, (1.0,))
    assert [s["decoder_layers"] for s in plain.settings] == [3, 2, 1]
    for settings, message in (
        ([{"scale": 1.5}], r"scale=1.5 must lie in \(0, 1\]"),
        ([{"scale": 1.0, "top_k": 2}], "top_k=2: the model has no part"),
    ):
        with pytest.raises(ValueError, match=message):
            DetectorSubject(subject.model, SIZE, settings)


def test_two_stages_are_one_run_of_the_model(subject):
    """At the full size exactly; at another one, of the image that was resized before."""
    item, model = make_items(1)[0], subject.model
    item |= {"height": 256, "width": 384}
    for setting in subject.settings:
        found = subject.finish(subject.begin(item, setting), setting)
        images, _ = model.preprocess([item])
        if setting["scale"] < 1:
            images = torch.nn.functional.interpolate(
                images, (64, 96), mode="bilinear", antialias=True
            )
        knobs = Knobs(keep_ratio=setting["keep_ratio"], decoder_layers=setting["decoder_layers"])
        with torch.no_grad():
            outputs = model.predict(images, knobs=knobs)
        expected = model.postprocess(outputs, [(256, 384)])[0]
        assert torch.equal(found.scores, expected.scores) and found.image_size == (256, 384)
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_features_and_what_is_known(subject):
    item, dark = make_items(2)
    dark["image"] = torch.zeros_like(dark["image"])
    states = [subject.begin(item, setting) for setting in subject.settings]
    assert all(state.features.shape == states[0].features.shape for state in states)
    assert torch.equal(states[0].features, states[1].features)  # another setting of the same tier
    assert subject.known(dark).tolist() == [0, 0]
    assert 0.3 < subject.known(item)[0] < 0.7


@pytest.fixture(scope="module")
def table(subject):
    return measure_table(subject, make_items(1), rounds=2, warmup=0)


def test_outcomes_of_a_detector(subject, table):
    items = make_items(3)
    found = Outcomes(subject, items, table, keep=True).run_all()
    assert found.quality.shape == (3, len(table.settings)) and (found.quality >= 0).all()
    setting = table.settings[-1]
    output = subject.finish(subject.begin(items[1], setting), setting)
    index = len(table.settings) - 1
    assert torch.equal(found.outputs[1, index].scores, output.scores)
    assert found.quality[1, index] == pytest.approx(subject.quality(output, items[1]))


def test_a_predictor_keeps_to_its_budget(subject, table, tmp_path, caplog):
    table.save(tmp_path / "table.json")
    predict = Predictor(subject.model, tmp_path / "table.json")
    pixels = np.random.default_rng(0).integers(256, size=(96, 160, 3), dtype=np.uint8)
    found = predict(pixels, budget_ms=1e6)
    assert found.instances.image_size == (96, 160) and found.milliseconds > 0
    p50, p95 = table.of(subject, make_items(1)[0])
    assert found.setting == table.settings[int(p50.argmax())]
    Image.fromarray(pixels).save(tmp_path / "image.png")
    again = predict(tmp_path / "image.png", budget_ms=1e6)
    assert torch.equal(again.instances.scores, found.instances.scores)
    middle = float(p95.median())
    assert predict(pixels, budget_ms=middle).expected <= middle
    with caplog.at_level(logging.WARNING):
        hurried = predict(pixels, budget_ms=1e-3)
    assert hurried.setting == table.settings[int(p95.argmin())]
    assert "budget_ms=0.001 is below the fastest setting's" in caplog.text
    with pytest.raises(ValueError, match="budget_ms=-1 must be positive"):
        predict(pixels, budget_ms=-1)


def test_a_predictor_asks_its_controller(subject, table, tmp_path):
    quality = -table.of(subject, make_items(1)[0])[0]  # the fastest is the best
    controller = BestStatic(Space(table.settings, table.tier), quality)
    save_controller(tmp_path / "controller.pth", controller)
    item = make_items(1)[0]
    for given in (controller, tmp_path / "controller.pth"):
        found = Predictor(subject.model, table, given).predict(item, 1e6)
        assert found.setting == table.settings[int(quality.argmax())]
    other = BestStatic(Space(table.settings[:1], table.tier))
    with pytest.raises(ValueError, match="the controller chooses among other settings"):
        Predictor(subject.model, table, other)
    with pytest.raises(ValueError, match="the latency table is of another model"):
        Predictor(tiny_model(), table)


CONFIG = "projects/latency_budget/configs/vit_moe_roadside.py"
TINY = [
    "model.backbone.vit={embed_dim:32,depth:8,num_heads:2}",
    "model.backbone.adapter.in_channels=32",
    "dataloader.image_size=[64,96]",
    "model.supernet.keep_ratio=[1.0,0.5]",
    "model.supernet.top_k=[1]",
    "model.supernet.vit_blocks=[8]",
    "model.supernet.decoder_layers=[3,1]",
]


def test_tools_measure_and_draw(tmp_path, capsys):
    file = tmp_path / "table.json"
    options = ["--config-file", CONFIG, "--device", "cpu"]
    rounds = ["--scales", "1", "0.5", "--batch-size", "1", "2", "--rounds", "2"]
    latency_table.main([*options, *rounds, "--output", str(file), *TINY])
    printed = capsys.readouterr().out
    assert "repeated measurement" in printed and "decoder_layers" in printed
    table = LatencyTable.load(file)
    assert {shape.split("x")[0] for shape, _ in table.times} == {"1", "2"}
    assert json.loads(file.read_text())["about"]["subject"] == {"image_size": [64, 96]}

    torch.manual_seed(0)
    model = build_model(read_config(CONFIG, TINY, "cpu"))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    pixels = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    drawing = [*options, "--weights", str(tmp_path / "weights.pth")]
    drawing += ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    visualize.main([*drawing, "--budget-ms", "1000", "--latency-table", str(file), *TINY])
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "a.png").is_file() and "budget of 1000 ms: median " in printed
    with pytest.raises(SystemExit):
        visualize.main([*drawing, "--budget-ms", "1000", *TINY])
    assert "--budget-ms and --latency-table go together" in capsys.readouterr().err
