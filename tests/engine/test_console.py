import logging

import pytest
import torch
from detectron2.utils.events import EventStorage

from dset_d2.engine.console import (
    ConsoleWriter,
    PlainFormatter,
    Selection,
    evaluation_lines,
    kind_of,
    printed_to_log,
    sums_by_kind,
)

from ..conftest import make_inputs, sparse_model, tiny_model


def losses_of(model: torch.nn.Module) -> dict[str, float]:
    return {k: v.item() for k, v in model.train()(make_inputs([(64, 96)])).items()}


@pytest.mark.parametrize("name", ["rtdetr", "dfine"])
def test_every_loss_has_a_kind(name):
    model = sparse_model() if name == "rtdetr" else tiny_model("configs/dfine/dfine_n_coco.py")
    losses = losses_of(model)
    kinds = sums_by_kind(losses)
    wanted = ["class", "box", "iou", "denoising", "aux"]
    extra = ["sparse"] if name == "rtdetr" else ["fgl", "ddf"]
    assert sorted(kinds) == sorted(wanted + extra)
    assert sum(kinds.values()) == pytest.approx(sum(losses.values()))
    assert kinds["box"] == losses["loss_bbox"] and kinds["iou"] == losses["loss_giou"]


def test_what_is_of_no_kind_is_not_lost():
    assert kind_of("loss_new") == "other"
    assert list(sums_by_kind({"loss_new": 1.0, "loss_bbox": 2.0})) == ["box", "other"]


def test_a_line_is_short_and_adds_up(caplog):
    caplog.set_level("INFO")
    writer = ConsoleWriter(max_iter=72000)
    with EventStorage(start_iter=71800) as storage:
        writer.write()  # as Detectron2 does after a first step that failed
        for step in range(71800, 71804):
            storage.iter = step
            terms = {"loss_vfl": 0.25, "loss_bbox": 1.0 + step % 2, "loss_giou": 2.0}
            terms |= {f"loss_{x}_aux_{i}": 1.0 for x in ("vfl", "bbox") for i in range(5)}
            terms |= {"loss_vfl_dn_0": 3.0, "loss_z_encoder_0": 0.001, "loss_ddf_aux_0": -1e-9}
            storage.put_scalars(total_loss=sum(terms.values()), **terms)
            storage.put_scalars(time=0.5, epoch=99.7, lr=1e-4, smoothing_hint=False)
        writer.write()
        writer.write()  # as Detectron2 does after the last step
        storage.iter = 72000
        writer.write()
    (line,) = caplog.messages
    assert line.startswith("step 71804/72000  epoch 99.7  loss 16.75  class 0.250  box 1.50  iou 2")
    assert "ddf 0.000  denoising 3.00  aux 10.00  sparse 0.001  lr 0.0001  ETA 0:01:38" in line
    assert line.endswith(" GiB") and len(line) < 160 and "loss_" not in line


def test_evaluations_take_a_line_each():
    box = {"AP": 12.345, "AP50": 30.0, "AP75": float("nan"), "APs": 1.0, "AP-Car": 2.0}
    assert evaluation_lines({"bbox": box}) == ["bbox: AP 12.35  AP50 30.00  AP75 nan"]
    nested = {"night": {"bbox": box}, "day": {"bbox": box}}
    assert [x.partition(": ")[0] for x in evaluation_lines(nested)] == ["night/bbox", "day/bbox"]
    assert evaluation_lines({"panoptic": {"PQ": 1.0, "n": 3}}) == ["panoptic: PQ 1.00  n 3"]
    assert evaluation_lines({}) == []


def record(name: str, level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, text, None, None)


def test_the_console_shows_ours_and_warnings():
    passes = Selection().filter
    assert passes(record("dset_d2.engine.hooks", logging.INFO, "Epoch 1 is done"))
    assert not passes(record("detectron2.data.build", logging.INFO, "a table"))
    assert passes(record("detectron2.data.build", logging.WARNING, "no images"))
    data = record("dset_d2.data.dair_v2x", logging.WARNING, "3 images are missing")
    assert passes(data) and not passes(data)  # loaded once more
    assert passes(record("dset_d2.data.dair_v2x", logging.WARNING, "4 images are missing"))


def test_files_have_no_colours():
    text = PlainFormatter("%(message)s").format(record("x", logging.INFO, "\x1b[36mcar\x1b[0m 1"))
    assert text == "car 1"


def test_what_is_printed_goes_to_the_log(caplog, capsys):
    caplog.set_level("DEBUG")
    with pytest.raises(ValueError), printed_to_log():
        print("Average Precision")
        raise ValueError
    assert capsys.readouterr().out == "" and "Average Precision" in caplog.text
