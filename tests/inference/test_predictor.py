"""The predictor: pictures of all kinds in, instances out."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

from dset_d2.data.frames import Frame
from dset_d2.data.reading import DataError, UnreadableImage
from dset_d2.inference import Predictor
from dset_d2.inference.predictor import as_record

from ..conftest import tiny_model
from ..data.test_frames import photo, video

NAMES = ("car", "van", "bus", "truck", "person")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(tiny_model().train(), resize=T.Resize((64, 96)), classes=NAMES)


def test_files_and_arrays_give_the_same(predictor, tmp_path):
    path = photo(tmp_path / "a.png")
    pixels = np.asarray(Image.open(path))
    found, same = predictor(path).instances, predictor(pixels).instances
    torch.testing.assert_close(found.pred_boxes.tensor, same.pred_boxes.tensor)
    assert found.image_size == (32, 48) and not found.scores.requires_grad
    assert not predictor.detector.training
    model = predictor.detector
    inputs = {"image": torch.from_numpy(np.full((3, 64, 96), 100, np.uint8))}
    with torch.no_grad():
        (expected,) = model([inputs | {"height": 32, "width": 48}])
    torch.testing.assert_close(found.scores, expected["instances"].scores)


def test_streams_of_everything(predictor, tmp_path):
    photo(tmp_path / "a.png")
    video(tmp_path / "b.avi", frames=3)
    found = list(predictor.stream(tmp_path, str(tmp_path / "*.png")))
    assert [frame.number for frame, _ in found] == [None, 0, 1, 2, None]
    sizes = [x.instances.image_size for _, x in found]
    assert sizes == [(32, 48), *[(48, 64)] * 3, (32, 48)]


def test_bad_input_is_named(predictor, tmp_path):
    with pytest.raises(FileNotFoundError, match="no.png"):
        predictor(tmp_path / "no.png")
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(UnreadableImage, match="bad.png: cannot read this image"):
        predictor(tmp_path / "bad.png")
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        list(predictor.stream("nowhere"))
    for wrong in (np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3)), np.zeros((3, 4, 5), np.uint8)):
        with pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8"):
            predictor(wrong)
    with pytest.raises(ValueError, match="budget_ms=40 needs a latency table"):
        predictor(np.zeros((4, 5, 3), np.uint8), budget_ms=40)
    with pytest.raises(ValueError, match="a latency table is for a DETRDetector, not function"):
        Predictor(lambda inputs: [], "table.json")


def test_records_hold_what_reaches_the_threshold(predictor):
    image = np.zeros((32, 48, 3), np.uint8)
    instances = predictor(image).instances
    threshold = instances.scores[4].item()
    record = as_record(Frame("a.mp4", 7, image), instances, NAMES, threshold)
    assert (record["source"], record["frame"]) == ("a.mp4", 7)
    assert (record["height"], record["width"]) == (32, 48)
    assert len(record["detections"]) == int((instances.scores >= threshold).sum()) >= 5
    first = record["detections"][0]
    assert first["class"] == NAMES[instances.pred_classes[0]]
    assert first["score"] == pytest.approx(instances.scores[0].item(), abs=1e-4)
    assert first["box"] == pytest.approx(instances.pred_boxes.tensor[0].tolist(), abs=0.01)
