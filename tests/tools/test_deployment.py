"""The table of deployed speed, tiny."""

import json

import pytest
import torch
from detectron2.config import instantiate

import dset_d2
from dset_d2.analysis.peers import PEERS, Peer
from dset_d2.inference.export import agreement
from dset_d2.synthetic import write_dataset
from dset_d2.tools import deployment

from ..conftest import NARROW, make_inputs, randomise

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CONFIG = "projects/dset/configs/dset_r18_roadside.py"
SMALL = [*NARROW, "dataloader.image_size=[64,96]", "model.decoder.num_layers=1"]


def test_every_form_is_timed_and_evaluated(tmp_path, monkeypatch, capsys):
    def broken(subject):
        raise RuntimeError("no such operator")

    kept = ("transformers", "eager", "optimised")
    forms = {form: deployment.FORMS[form] for form in kept} | {"int8": broken}
    monkeypatch.setattr(deployment, "FORMS", forms)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_dataset(tmp_path, num_train=1, num_val=2, height=96, width=160, seed=3, progress=False)
    torch.manual_seed(0)
    cfg = dset_d2.get_config(CONFIG)
    torch.save({"model": randomise(instantiate(cfg.model)).state_dict()}, tmp_path / "model.pth")
    options = ["--output", str(tmp_path / "out"), "--rounds", "2", "--batch-size", "1", "2"]
    trained = ["--trained", CONFIG, str(tmp_path / "model.pth")]
    deployment.main(["--config-file", CONFIG, *options, *trained, "--", *SMALL])

    found = json.loads((tmp_path / "out/deployment.json").read_text())
    timed = {(x["form"], x["batch_size"]): x for x in found["speed"]}
    assert len(timed) == len(found["speed"]) == 2 * len(forms)
    for form in ("eager", "optimised"):
        assert timed[form, 1]["seconds"] > 0 and timed[form, 2]["error"] is None
    assert timed["int8", 1]["seconds"] is None and "no such operator" in timed["int8", 1]["error"]
    scores = {x["form"]: x["AP"] for x in found["AP"]}
    assert scores["transformers"] is scores["int8"] is None
    assert scores["optimised"] == pytest.approx(scores["eager"], abs=0.1, nan_ok=True)
    text = (tmp_path / "out/deployment.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert text.count("no such operator") == 2  # of the timed model and of the trained one
    assert not any("transformers" in line for line in text.splitlines() if "dset_r18" in line)


def tiny_peer() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[16] * 3,
        decoder_in_channels=[32] * 3,
        d_model=32,
        encoder_hidden_dim=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        decoder_layers=2,
        initializer_range=0.2,
        num_labels=3,
        num_queries=20,
        anchor_image_size=None,
    )
    return transformers.RTDetrV2ForObjectDetection(config)


def test_peers_are_files_too(tmp_path):
    torch.manual_seed(0)
    network, noise = tiny_peer(), torch.nn.Identity()
    noise.size_divisibility = 32
    subject = deployment.Subject(noise, ("car",), (64, 96), tmp_path, [], lambda: network)
    detectors = [subject.make(form, (2,)) for form in ("transformers", "transformers, onnxruntime")]
    assert not subject.errors
    inputs = make_inputs([(64, 96)] * 2)
    with torch.inference_mode():
        expected, found = (detector(inputs) for detector in detectors)
    for one, other in zip(found, expected):
        assert agreement(one["instances"], other["instances"]) > 0.97


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_the_same_networks(name):
    """As many parameters as ours but for what we leave out, and detections of the same form."""
    pytest.importorskip("transformers")
    path = f"configs/{'rtdetr' if 'r18' in name else 'dfine'}/{name}.py"
    ours = instantiate(dset_d2.get_config(path).model)
    theirs = PEERS[name]()
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)
    with torch.inference_mode():
        (found,) = Peer(theirs)(make_inputs([(160, 224)]))
    instances = found["instances"]
    assert len(instances) == 300 and instances.image_size == (160, 224)
    assert (instances.scores.diff() <= 0).all()
