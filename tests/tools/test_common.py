"""What all tools that take a config have in common."""

import builtins
from importlib import import_module
from itertools import product

import pytest
import torch
from detectron2.config import instantiate

import dset_d2
from dset_d2.tools.common import ConfigToolParser, read_config

from ..data.test_coco import names, write
from ..test_configs import ROOT

CONFIG = "configs/rtdetr/rtdetrv2_r18_roadside.py"
TOOLS = {
    "ablation": ["--variant", "x:", "--output", "out"],
    "analyze": ["--weights", "missing.pth"],
    "benchmark": [],
    "convert_checkpoint": ["--weights", "missing.pth", "--output", "out"],
    "lazyconfig_train_net": ["--eval-only"],
    "swap_ffn": ["--weights", "missing.pth", "--output", "out"],
    "visualize": ["--weights", "missing.pth", "--output", "out"],
}
# What the message names, by what a config's file holds, or by an override.
BROKEN_FILES = {
    "model = (": ["config.py", "syntax error", "line 1"],
    "import none_such": ["config.py", "No module named 'none_such'", "config.py, line 1"],
    "model = 1 / 0": ["config.py", "ZeroDivisionError", "config.py, line 1"],
    "train = dict(device='cpu', init_checkpoint='', output_dir='')": ["the config has no model"],
}
BROKEN_OVERRIDES = {
    "model.decoder.num_querys=20": ["roadside.py", "num_querys", "close", "num_queries"],
    "model.decoder.num_queries=[20": ["roadside.py", "model.decoder.num_queries=[20"],
    "model.decoder.cross_attn_method=odd": ["config's model", "cross_attn_method='odd'", "default"],
    "model.decoder.hidden_dim=wide": ["roadside.py", "hidden_dim is a number"],
    "train.device=gpu": ["device 'gpu'"],
}


@pytest.fixture
def error_of(tmp_path, monkeypatch, capsys):
    """The last line that a tool ends with, in a place without any data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    # Detectron2 leaves its own import behind when a config fails.
    monkeypatch.setattr(builtins, "__import__", builtins.__import__)

    def run(tool: str, *arguments: str) -> str:
        module = import_module(f"dset_d2.tools.{tool}")
        main = module.main
        if tool == "lazyconfig_train_net":
            main = module.run
            # Loggers outlive a test.
            monkeypatch.setattr(module, "set_up", lambda *args, **kwargs: None)
        with pytest.raises(SystemExit) as stop:
            main([*arguments])
        assert stop.value.code == 2
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error.strip().splitlines()[-1]

    return run


def check(error: str, wanted: list[str]) -> None:
    assert error.startswith("error: ")
    for text in wanted:
        assert text in error


@pytest.mark.parametrize("tool", TOOLS)
def test_a_config_is_needed(tool, error_of):
    error = error_of(tool, *TOOLS[tool])
    assert "--config-file" in error and "required" in error


@pytest.mark.parametrize("tool", TOOLS)
def test_missing_configs_are_named_with_their_neighbours(tool, error_of):
    missing = "configs/rtdetr/rtdetrv2_r19_roadside.py"
    check(error_of(tool, "--config-file", missing, *TOOLS[tool]), [missing, "r18_roadside.py"])


@pytest.mark.parametrize("content", BROKEN_FILES)
@pytest.mark.parametrize("tool", TOOLS)
def test_broken_configs_are_named(tool, content, error_of, tmp_path):
    (tmp_path / "config.py").write_text(content)
    error = error_of(tool, "--config-file", "config.py", *weights(tool, tmp_path))
    check(error, BROKEN_FILES[content])


@pytest.mark.parametrize(
    ("tool", "override"),
    # convert_checkpoint needs no device.
    sorted(set(product(TOOLS, BROKEN_OVERRIDES)) - {("convert_checkpoint", "train.device=gpu")}),
)
def test_broken_overrides_are_named(tool, override, error_of, tmp_path):
    error = error_of(tool, "--config-file", CONFIG, *weights(tool, tmp_path), override)
    check(error, BROKEN_OVERRIDES[override])


def weights(tool: str, folder, name: str = "missing.pth") -> list[str]:
    """The tool's options, with weights where it takes some."""
    if tool == "lazyconfig_train_net":
        return ["--eval-only", f"train.init_checkpoint={folder / name}"]
    return [option.replace("missing.pth", str(folder / name)) for option in TOOLS[tool]]


@pytest.mark.parametrize("tool", sorted(TOOLS.keys() - {"ablation", "benchmark"}))
def test_weights_that_are_missing_or_do_not_fit_are_named(tool, error_of, tmp_path):
    options = ["--config-file", CONFIG]
    check(error_of(tool, *options, *weights(tool, tmp_path)), ["missing.pth: no such checkpoint"])
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    error = error_of(tool, *options, *weights(tool, tmp_path, "other.pth"))
    check(error, ["other.pth does not fit the model", "other"])
    (tmp_path / "text.pth").write_text("no weights")
    error = error_of(tool, *options, *weights(tool, tmp_path, "text.pth"))
    check(error, ["text.pth: not a checkpoint"])


def test_what_is_like_a_checkpoint_is_told_from_it(error_of, tmp_path):
    """A run's folder, a page that was downloaded in place of the file, a misspelt name."""
    run = tmp_path / "run"
    run.mkdir()
    options = ["--config-file", CONFIG, "--output", "out", "--weights"]
    check(error_of("convert_checkpoint", *options, str(run)), [f"{run}: is a folder without"])
    for name in ("model_0000009.pth", "model_final.pth", "model_best.pth"):
        (run / name).write_text("\n<!DOCTYPE html><title>Not found</title>")
    error = error_of("convert_checkpoint", *options, str(run))
    check(error, [f"{run}: is a folder; name one of its files: model_best.pth, model_final.pth"])
    error = error_of("convert_checkpoint", *options, str(run / "model_best.pth"))
    check(error, [f"{run}/model_best.pth: a web page, not weights"])
    error = error_of("convert_checkpoint", *options, str(run / "model_bset.pth"))
    check(error, ["model_bset.pth: no such checkpoint; the nearest is 'model_best.pth'"])


def test_misspelt_data_sets_are_named_with_the_nearest(error_of, tmp_path):
    model = instantiate(dset_d2.get_config(CONFIG).model)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    options = ["--config-file", CONFIG, "--weights", str(tmp_path / "model.pth")]
    wrong = "dataloader.test.dataset.names=dair_v2x_i_vall"
    error = error_of("visualize", *options, "--output", "out", wrong)
    check(error, ["no data set 'dair_v2x_i_vall'; the nearest is 'dair_v2x_i_val'"])


CUSTOM = sorted(
    path.relative_to(ROOT).as_posix()
    for top in ("configs", "projects")
    for path in ROOT.glob(f"{top}/**/*_custom.py")
)


def test_custom_configs_stand_for_every_family():
    assert len(CUSTOM) == 4


@pytest.mark.parametrize("config", CUSTOM)
def test_classes_are_counted_where_they_are_not_given(config, tmp_path, error_of):
    file, name = write(tmp_path), next(names)
    own = [f"dataloader.test.dataset.names={name}", f"dataloader.test.dataset.json_file={file}"]
    own += [f"dataloader.test.dataset.image_root={tmp_path}"]
    cfg = read_config(config, own)
    assert cfg.model.decoder.num_classes == cfg.model.criterion.num_classes == 2
    assert read_config(config, [*own, "model.decoder.num_classes=3"]).model.decoder.num_classes == 3
    # Registered by now. Training's is asked first.
    assert read_config(config, own[:1]).model.decoder.num_classes == 2
    write(tmp_path, categories=("car", "bus", "cone"))
    other = next(names)
    train = [override.replace(".test.", ".train.").replace(name, other) for override in own]
    assert read_config(config, [*own[:1], *train]).model.decoder.num_classes == 3

    error = error_of("benchmark", "--config-file", config)
    check(error, ["num_classes is that of the data set: ", "'custom_train': set json_file"])
    error = error_of("benchmark", "--config-file", config, "dataloader.train.dataset.names=[]")
    check(error, ["num_classes is that of the data set: ", "names no data set"])
    (tmp_path / "set.json").write_text("{")
    train[0] = f"dataloader.train.dataset.names={next(names)}"
    error = error_of("benchmark", "--config-file", config, *train)
    check(error, ["num_classes is that of the data set: ", "set.json: not a COCO file"])


@pytest.mark.parametrize(
    "words, files, opts",
    [
        ("--config-file a.py b.py x=1 y.z=[2,3]", ["a.py", "b.py"], ["x=1", "y.z=[2,3]"]),
        ("--config-file a.py --input p x=1 +y=", ["a.py"], ["x=1", "+y="]),
        ("--input p --config-file a.py ./x=1", ["a.py", "./x=1"], []),
        ("--config-file a.py --input x=1 --", ["a.py"], []),
        ("--config-file a.py", ["a.py"], []),
    ],
)
def test_overrides_end_the_command(words, files, opts):
    parser = ConfigToolParser("A tool.", several=True)
    parser.add_argument("--input", nargs="+")
    args = parser.parse_args(words.split())
    assert (args.config_file, args.opts) == (files, opts)


def test_devices_are_named_in_one_way(error_of):
    for tool in ("ablation", "analyze", "benchmark", "visualize"):
        error = error_of(tool, "--config-file", CONFIG, *TOOLS[tool], "--device", "gpu")
        check(error, ["device 'gpu'"])
