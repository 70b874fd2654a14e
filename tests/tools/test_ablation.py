import json

import pytest

from dset_d2.synthetic import write_dataset
from dset_d2.tools import ablation

DSET = "projects/dset/configs/dset_r18_roadside.py"
TINY = [
    "model.encoder.hidden_dim=32",
    "model.encoder.dim_feedforward=64",
    "model.decoder.hidden_dim=32",
    "model.decoder.dim_feedforward=64",
    "model.decoder.num_queries=30",
    "dataloader.image_size=[64,96]",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "lr_multiplier.warmup_iters=1",
    "train.max_iter=2",
    "train.log_period=1",
]


def test_variants_are_trained_once_and_set_side_by_side(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path, num_train=4, num_val=2, height=96, width=160, seed=1, progress=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    options = ["--config-file", DSET, "--seeds", "0", "--output", str(tmp_path / "ablation")]
    options += ["--variant", "dense: configs/rtdetr/rtdetrv2_r18_roadside.py"]
    options += [
        "--variant",
        "DSET: model.encoder.pruning.min_tokens=2 model.encoder.pruning.end_step=0",
    ]
    options += ["--latency-rounds", "1", "--device", "cpu", *TINY]
    ablation.main(options)
    dense, sparse = json.loads((tmp_path / "ablation/results.json").read_text())
    assert dense["variant"] == "dense" and dense["latency_ratio"] == 1.0
    assert dense["foreground_recall"] == [None]
    kept, share = sparse["foreground_recall"][0]
    assert 0 < kept <= 1
    assert sparse["foreground_recall_untrained"][0][1] == share
    assert share == pytest.approx(5 / 6)  # ceil(.7 * 6) of 2 x 3 tokens
    assert 0 < sparse["GMACs"] != dense["GMACs"]
    assert "latency ratio" in capsys.readouterr().out
    assert (tmp_path / "ablation/curves.png").stat().st_size > 0

    weights = tmp_path / "ablation/DSET_0/model_final.pth"
    before = weights.stat().st_mtime_ns
    ablation.main(options)
    assert weights.stat().st_mtime_ns == before

    with pytest.raises(SystemExit):  # a longer run would be set beside shorter ones
        ablation.main([*options, "train.max_iter=3"])
    assert "dense_0 holds a run with other settings" in capsys.readouterr().err
    (tmp_path / "ablation/DSET_0/settings.json").unlink()  # whatever run that was
    with pytest.raises(SystemExit):
        ablation.main(options)
    assert "DSET_0 holds a run with other settings" in capsys.readouterr().err


def test_a_run_that_did_not_start_can_be_corrected(tmp_path):
    run = ablation.Run(DSET, ["train.max_itr=2"], tmp_path / "DSET_0")
    ablation.claim(run)
    with pytest.raises(RuntimeError, match="stdout.txt says why"):
        ablation.train(run)
    assert "train.max_iter" in (run.folder / "stdout.txt").read_text()
    ablation.claim(run._replace(overrides=["train.max_iter=2"]))


def test_a_variant_needs_a_name(capsys):
    with pytest.raises(SystemExit):
        ablation.main(["--config-file", DSET, "--variant", "model.x=1", "--output", "x"])
    assert "not of the form 'name: overrides'" in capsys.readouterr().err
