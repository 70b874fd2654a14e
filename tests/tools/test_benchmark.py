import json

import pytest

from dset_d2.tools import benchmark

from ..conftest import NARROW

R18 = "configs/rtdetr/rtdetrv2_r18_coco.py"


def run(tmp_path, *arguments):
    output = tmp_path / "benchmark.json"
    benchmark.main(
        ["--config-file", *arguments, "--device", "cpu", "--rounds", "3"]
        + ["--output", str(output), *NARROW]
    )
    return json.loads(output.read_text())


def test_sweep_over_batches_and_sizes(tmp_path, capsys):
    report = run(
        tmp_path, R18, R18, "--batch-size", "1", "2", "--image-size", *"64 64 64 96".split()
    )
    rows = report["results"]
    assert len(rows) == 2 * 2 * 2
    grid = [(row["image_size"], row["batch_size"]) for row in rows[::2]]
    assert grid == [([64, 64], 1), ([64, 64], 2), ([64, 96], 1), ([64, 96], 2)]
    for first, second in zip(rows[::2], rows[1::2]):
        assert (first["config"], second["config"]) == ("rtdetrv2_r18_coco", "rtdetrv2_r18_coco (2)")
        assert first["ratio"] == 1.0 and first["ratio_quartiles"] == [1.0, 1.0]
        assert second["ratio"] > 0
        low, high = first["quartiles"]
        assert low <= first["median"] <= high
        assert first["images_per_second"] == first["batch_size"] / first["median"]
    assert "random weights, noise images" in capsys.readouterr().out


def test_variants(tmp_path, capsys):
    variants = ["--variant", "as it is:", "--variant", "short: model.decoder.num_layers=1"]
    rows = run(tmp_path, R18, *variants, "--image-size", "64", "64")["results"]
    assert [row["config"] for row in rows] == ["as it is", "short"]
    assert rows[0]["ratio"] == 1 and rows[0]["macs"] > rows[1]["macs"] > 0
    assert f"{rows[1]['macs'] / 1e9:.2f}" in capsys.readouterr().out
    for wrong, message in (
        ([R18, R18, *variants], "--variant takes one --config-file"),
        ([R18, *variants[:2], *variants[:2]], "--variant: given more than once: as it is"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, *wrong)
        assert message in capsys.readouterr().err


def test_layout_and_precision(tmp_path):
    report = run(
        tmp_path, R18, "--image-size", "64", "64", "--channels-last", "--dtype", "bfloat16"
    )
    assert report["channels_last"] and report["dtype"] == "bfloat16"
    assert len(report["results"]) == 1


def test_configs_run_at_their_own_sizes(tmp_path, capsys):
    wide = tmp_path / "wide.py"
    wide.write_text(
        "import dset_d2\n"
        f"cfg = dset_d2.get_config({R18!r})\n"
        "model, train, dataloader = cfg.model, cfg.train, cfg.dataloader\n"
        "dataloader.image_size = [64, 128]\n"
    )
    small = tmp_path / "small.py"
    small.write_text(wide.read_text().replace("128", "96"))
    rows = run(tmp_path, str(wide), str(small), "--batch-size", "1", "2")["results"]
    assert [row["image_size"] for row in rows] == [[64, 128], [64, 96]] * 2
    printed = capsys.readouterr().out
    assert "each config at its own dataloader.image_size, which differ" in printed
    assert "64 x 128" in printed and "64 x 96" in printed
    (row,) = run(tmp_path, str(wide))["results"]
    assert row["image_size"] == [64, 128]
    assert "size: the configs' dataloader.image_size" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([R18, "dataloader.image_size=640"], "dataloader.image_size is 640, not [height, width]"),
        ([R18, "--image-size", "64"], "pairs of height and width"),
        ([R18, "--rounds", "0"], "positive"),
    ],
)
def test_errors_say_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(["--config-file", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
