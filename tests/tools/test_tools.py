import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from PIL import Image

import dset_d2
from dset_d2.data import dair_v2x
from dset_d2.synthetic import write_dataset
from dset_d2.tools import convert_checkpoint, visualize

ROADSIDE = "configs/rtdetr/rtdetrv2_r18_roadside.py"


def test_converted_weights_load_with_detectron2(tmp_path, capsys):
    model = instantiate(dset_d2.get_config(ROADSIDE).model)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("clock.")}
    torch.save({"ema": {"module": state}}, tmp_path / "released.pth")
    options = ["--config-file", ROADSIDE, "--weights", str(tmp_path / "released.pth")]
    convert_checkpoint.main([*options, "--output", str(tmp_path / "init.pth")])
    other = instantiate(dset_d2.get_config(ROADSIDE).model)
    extra = DetectionCheckpointer(other).load(str(tmp_path / "init.pth"))
    assert extra == {}
    torch.testing.assert_close(other.state_dict(), model.state_dict())

    with pytest.raises(SystemExit) as stop:
        convert_checkpoint.main(["--config-file", ROADSIDE, "--weights", "no.pth", "--output", "x"])
    assert stop.value.code == 2 and "no.pth: no such checkpoint" in capsys.readouterr().err


def test_pictures_of_a_data_set_and_of_files(tmp_path, monkeypatch):
    write_dataset(tmp_path, num_train=1, num_val=3, height=96, width=160, seed=3, progress=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    model = instantiate(dset_d2.get_config(ROADSIDE).model)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    options = ["--config-file", ROADSIDE, "--weights", str(tmp_path / "model.pth")]
    options += ["--threshold", "0.001"]
    visualize.main([*options, "--output", str(tmp_path / "set"), "--num-images", "2"])
    pictures = sorted((tmp_path / "set").iterdir())
    assert len(pictures) == 2
    assert all(Image.open(p).size == (320, 96) for p in pictures)  # truth beside detections

    # Data of the user's, in COCO's format and under a name of its own.
    dataset = dair_v2x.load_dair_v2x(
        tmp_path / "dair-v2x/single-infrastructure-side",
        tmp_path / "dair-v2x/split_datas/single-infrastructure-split-data.json",
        "val",
    )
    coco = dair_v2x.to_coco(dataset, dair_v2x.CLASSES_8, tmp_path)
    (tmp_path / "val.json").write_text(json.dumps(coco))
    own = ["--config-file", "configs/rtdetr/rtdetrv2_r18_custom.py", *options[2:]]
    own += ["--output", str(tmp_path / "own"), "--num-images", "1"]
    own += ["model.encoder.hidden_dim=128", "model.encoder.dim_feedforward=512"]
    own += ["model.decoder.hidden_dim=128", "model.decoder.dim_feedforward=512"]
    own += ["model.decoder.num_classes=8", "dataloader.image_size=[96,160]"]
    own += [f"dataloader.test.dataset.json_file={tmp_path}/val.json"]
    own += [f"dataloader.test.dataset.image_root={tmp_path}"]
    visualize.main(own)
    assert len(list((tmp_path / "own").iterdir())) == 1

    file = next(tmp_path.glob("dair-v2x/*/image/*.jpg"))
    visualize.main([*options, "--output", str(tmp_path / "files"), "--input", str(file)])
    (picture,) = (tmp_path / "files").iterdir()
    assert Image.open(picture).size == (160, 96)
    assert Image.open(picture).tobytes() != Image.open(file).tobytes()
