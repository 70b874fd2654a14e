import argparse
import json

import pytest
from torch import nn

from dset_d2.modeling.context import current
from dset_d2.modeling.sparse import PruningConfig, TokenPruner
from dset_d2.synthetic import write_dataset
from dset_d2.tools import ablation, preparation
from dset_d2.tools.trainings import usable_cores

from ..conftest import TINY_RUN, sparse_model, tiny_model

DSET = "projects/dset/configs/dset_r18_roadside.py"
DENSE = "configs/rtdetr/rtdetrv2_r18_roadside.py"
TINY = [*TINY_RUN, "lr_multiplier.warmup_iters=1", "train.max_iter=2"]
TINY += ["dataloader.test.num_workers=1"]  # a process with a child, as in real runs


def test_variants_are_trained_once_and_set_side_by_side(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path, num_train=4, num_val=1, height=96, width=160, seed=1, progress=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    evaluated_at = []

    def check_data(*args):
        evaluate = preparation.check_data(*args)

        def noted(model):
            evaluated_at.append(current().knobs.keep_ratio)
            return evaluate(model)

        return noted

    monkeypatch.setattr(ablation, "check_data", check_data)
    output = tmp_path / "ablation"  # the name of a run becomes an override's value
    options = ["--config-file", DSET, "--seeds", "0", "--output", str(output)]
    options += ["--variant", f"dense, ü: {DENSE}"]
    options += [
        "--variant",
        "DSET: model.encoder.pruning.min_tokens=2 model.encoder.pruning.end_step=0",
    ]
    jobs = min(2, len(usable_cores()))
    options += ["--jobs", str(jobs), "--keep-ratios", "0.7"]
    options += ["--latency-rounds", "1", "--device", "cpu", *TINY]
    ablation.main(options)
    rows = json.loads((output / "results.json").read_text())
    dense, sparse, whole, same = rows
    assert [row["variant"] for row in rows] == ["dense, ü", "DSET", "DSET @1", "DSET @0.7"]
    assert dense["latency_ratio"] == 1.0
    assert dense["foreground_recall"] == [None]
    kept, share = sparse["foreground_recall"][0]
    assert 0 < kept <= 1
    assert sparse["foreground_recall_untrained"][0][1] == share
    assert share == pytest.approx(5 / 6)  # ceil(.7 * 6) of 2 x 3 tokens
    assert 0 < sparse["GMACs"] != dense["GMACs"]
    # Trained weights at the ratio that is configured are as at the end of the training.
    for key in ("AP", "AP50", "GMACs", "foreground_recall"):
        assert same[key] == sparse[key]
    assert whole["foreground_recall"] == [[1.0, 1.0]]
    assert whole["GMACs"] != same["GMACs"]
    assert evaluated_at == ([1.0, 0.7] if jobs == 1 else [])  # else in other processes
    assert [row["reference"] for row in rows] == ["dense, ü", "dense, ü", "dense, ü", "DSET @1"]
    assert same["AP_difference"] == [same["AP"][0] - whole["AP"][0]]
    assert [row["curve"] for row in rows] == ["dense, ü", "DSET", "DSET", "DSET"]
    assert "latency ratio" in capsys.readouterr().out
    assert (output / "table.txt").read_text().splitlines()[-1].startswith("1 seed: how far")
    for picture in ("curves.png", "tradeoff.png"):
        assert (output / picture).stat().st_size > 0

    runs = [output / "dense, ü_0", output / "DSET_0"]
    files = [run / name for run in runs for name in ("stdout.txt", "evaluations.json")]
    before = [file.stat().st_mtime_ns for file in files]
    # One of them was killed before its last evaluation; a better one came before that.
    for name in ("model_final.pth", "last_checkpoint"):
        (runs[1] / name).unlink()
    metrics = runs[1] / "metrics.json"
    lines = [line for line in metrics.read_text().splitlines() if "bbox/AP" not in line]
    lines.insert(1, '{"iteration": 0, "bbox/AP": 99.0, "bbox/AP50": 99.0}')
    metrics.write_text("\n".join(lines) + "\n")
    # What was found of its former weights is of no use, what was found of the other run's is.
    (runs[1] / "evaluations.json").write_text('{"@1": {"AP": 99.0}}')
    ablation.main([*options[: -len(TINY)], "--jobs", "1", *TINY])
    again = json.loads((output / "results.json").read_text())
    assert [row["AP"] for row in again] == [row["AP"] for row in rows]
    after = [file.stat().st_mtime_ns for file in files]
    assert evaluated_at[-2:] == [1.0, 0.7]
    assert after[:2] == before[:2] and after[2] > before[2] and after[3] > before[3]

    with pytest.raises(SystemExit):  # a longer run would be set beside shorter ones
        ablation.main([*options, "train.max_iter=3"])
    assert "dense, ü_0 holds a run with other settings" in capsys.readouterr().err
    (output / "DSET_0/settings.json").unlink()  # whatever run that was
    with pytest.raises(SystemExit):
        ablation.main(options)
    assert "DSET_0 holds a run with other settings" in capsys.readouterr().err


def vit_pruned(*scorers: str) -> nn.Module:
    model = sparse_model()
    configs = [PruningConfig(keep_ratio=0.5, scorer=scorer) for scorer in scorers]
    model.backbone.pruners = nn.ModuleList(TokenPruner(config, 8) for config in configs)
    return model


@pytest.mark.parametrize(
    "model, scorers, settings",
    [
        (tiny_model, [], "as configured"),
        (sparse_model, [], "as configured, @1, @0.5, @0.3"),
        # Without a choice of scorers in the backbone: as configured alone.
        (sparse_model, ["attention"], "as configured, @1, @0.5, @0.3"),
        (
            lambda: vit_pruned("learned", "learned"),
            ["learned", "attention"],
            "as configured, @1, @0.5, @0.3, @1 attention, @0.5 attention, @0.3 attention",
        ),
        (
            lambda: vit_pruned("learned"),
            ["attention"],
            "as configured, @1 attention, @0.5 attention, @0.3 attention",
        ),
        # There is no learned scorer in what was trained without.
        (
            lambda: vit_pruned("attention"),
            ["learned", "attention"],
            "as configured, @1, @0.5, @0.3",
        ),
    ],
)
def test_settings_are_those_that_a_model_has_parts_for(model, scorers, settings):
    args = argparse.Namespace(keep_ratios=[0.3, 0.5], scorers=scorers)
    assert ", ".join(map(str, ablation.settings_of(model(), args))) == settings


def test_only_the_scorers_of_the_backbone_are_changed():
    model = vit_pruned("learned", "learned")
    ablation.choose_scorer(model, "attention")
    assert [pruner.config.scorer for pruner in model.backbone.pruners] == ["attention"] * 2
    pruners = [part for part in model.encoder.modules() if isinstance(part, TokenPruner)]
    assert pruners and all(vars(p.config).get("scorer", "learned") == "learned" for p in pruners)


def rows_of(aps: dict[str, list[float]], first: str = "dense") -> list[dict]:
    """Rows as they are reported, the later the faster, of variants and of their settings."""
    rows = []
    for index, (text, ap) in enumerate(aps.items()):
        name, _, at = text.partition(" @")
        ratio, _, scorer = at.partition(" ")
        setting = ablation.Setting(float(ratio), scorer or None) if at else ablation.Setting()
        rows.append(
            ablation.labels(name, setting, first) | {"AP": ap, "latency_ratio": 1 - index / 10}
        )
        assert rows[-1]["variant"] == text
    return rows


APS = {
    "dense": [40.0, 42.0],
    "pruned 0.7": [39.0, 40.0],
    "pruned 0.5": [35.0, 38.5],
    "random": [36.0, 38.0],
    "random @1": [38.0, 39.0],
    "random @0.5": [37.0, 38.5],
    "random @1 attention": [38.0, 39.0],
    "random @0.5 attention": [30.0, 33.5],
}


def test_differences_are_paired_and_stand_beside_their_spread():
    rows = rows_of(APS)
    ablation.add_differences(rows)
    texts = {row["variant"]: (ablation.difference_text(row), row["reference"]) for row in rows}
    assert texts == {
        "dense": ("", "dense"),
        "pruned 0.7": ("-1.5 (1.0)", "dense"),
        "pruned 0.5": ("-4.2 (1.5)", "dense"),
        "random": ("-4.0 (0.0)", "dense"),
        "random @1": ("-2.5 (1.0)", "dense"),
        "random @0.5": ("-0.8 (0.5)", "random @1"),
        "random @1 attention": ("-2.5 (1.0)", "dense"),
        "random @0.5 attention": ("-6.8 (2.5)", "random @1 attention"),
    }
    assert ablation.shortcomings(rows).startswith(
        "2 seeds: those of one row differ by up to 3.5 AP (pruned 0.5)."
    )
    single = rows_of({"dense": [40.0], "pruned 0.7": [39.0]})
    ablation.add_differences(single)
    assert ablation.difference_text(single[1]) == "-1.0"
    assert "is not known" in ablation.shortcomings(single)


def test_picture_has_a_curve_for_each_mechanism():
    (axes,) = ablation.draw_tradeoff(rows_of(APS)).axes
    lines = axes.get_lines()
    curves, seeds = lines[::3], [line for i, line in enumerate(lines) if i % 3]
    assert [line.get_label() for line in curves] == [
        "dense", "pruned", "random", "random attention"
    ]  # fmt: skip
    points = [list(zip(line.get_xdata(), line.get_ydata())) for line in curves]
    assert points[0] == [(1.0, 41.0)]
    assert points[1] == [(0.8, 36.75), (0.9, 39.5)]  # in order of time
    assert len(points[2]) == 3 and len(points[3]) == 2
    assert all((line.get_color() == curves[1].get_color()).all() for line in seeds[2:4])
    assert [list(line.get_ydata()) for line in seeds[2:4]] == [[35.0, 39.0], [38.5, 40.0]]
    assert {text.get_text() for text in axes.texts} == {"", "0.7", "0.5", "1"}
    assert "dense" in axes.get_xlabel() and "%" in axes.get_ylabel()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--variant", "model.x=1"], "not of the form 'name: overrides'"),
        (["--variant", "a/b:"], "'a/b' names a folder"),
        (["--variant", "a:", "--variant", " a: x=1"], "--variant: given more than once: a"),
        (["--variant", "a@1:"], "no / \\ = or @ in it"),
        (["--variant", "a:", "--seeds", "1", "0", "1"], "--seeds: given more than once: 1"),
        (["--variant", "a:", "--jobs", "0"], "--jobs 0 must lie in 1.."),
        (["--variant", "a:", "--jobs", "9999"], "--jobs 9999 must lie in 1.."),
        (["--variant", "a:", "--latency-rounds", "0"], "--latency-rounds 0 must be positive"),
        (["--variant", "a:", "--keep-ratios", "1", "0"], "--keep-ratios 0 must lie in (0, 1]"),
        (["--variant", "a:", "--keep-ratios", "1.5"], "--keep-ratios 1.5 must lie in (0, 1]"),
        (["--variant", "a:", "--keep-ratios", "nan"], "--keep-ratios nan must lie in (0, 1]"),
        (["--variant", "a:", "--scorers", "attention"], "--scorers needs --keep-ratios"),
        (
            ["--variant", f"dense: {DENSE}", "--keep-ratios", "0.5"],
            "--keep-ratios: no variant has the knob keep_ratio",
        ),
        (
            ["--variant", "a:", "--keep-ratios", "0.5", "--scorers", "attention"],
            "--scorers: no variant prunes tokens in its backbone",
        ),
        (["--variant", "a: dataloader.test.dataset.names=[x,y]"], "dataloader.test names x, y: "),
    ],
)
def test_variants_are_told_apart_before_anything_is_trained(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        ablation.main(["--config-file", DSET, *options, "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
