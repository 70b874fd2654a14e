import json

import pytest

from dset_d2.synthetic import write_dataset
from dset_d2.tools import ablation

from ..conftest import TINY_RUN

DSET = "projects/dset/configs/dset_r18_roadside.py"
TINY = [*TINY_RUN, "lr_multiplier.warmup_iters=1", "train.max_iter=2"]


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

    runs = [tmp_path / "ablation/dense_0", tmp_path / "ablation/DSET_0"]
    before = [(run / "stdout.txt").stat().st_mtime_ns for run in runs]
    # One of them was killed before its last evaluation; a better one came before that.
    for name in ("model_final.pth", "last_checkpoint"):
        (runs[1] / name).unlink()
    metrics = runs[1] / "metrics.json"
    lines = [line for line in metrics.read_text().splitlines() if "bbox/AP" not in line]
    lines.insert(1, '{"iteration": 0, "bbox/AP": 99.0, "bbox/AP50": 99.0}')
    metrics.write_text("\n".join(lines) + "\n")
    ablation.main(options)
    again = json.loads((tmp_path / "ablation/results.json").read_text())
    assert [row["AP"] for row in again] == [dense["AP"], sparse["AP"]]
    after = [(run / "stdout.txt").stat().st_mtime_ns for run in runs]
    assert after[0] == before[0] and after[1] > before[1]

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


@pytest.mark.parametrize(
    "options, message",
    [
        (["--variant", "model.x=1"], "not of the form 'name: overrides'"),
        (["--variant", "a/b:"], "'a/b' names a folder"),
        (["--variant", "a:", "--variant", " a: x=1"], "--variant: given more than once: a"),
        (["--variant", "a:", "--seeds", "1", "0", "1"], "--seeds: given more than once: 1"),
        (["--variant", "a: dataloader.test.dataset.names=[x,y]"], "dataloader.test names x, y: "),
    ],
)
def test_variants_are_told_apart_before_anything_is_trained(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ablation.main(["--config-file", DSET, *options, "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
