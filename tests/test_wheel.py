"""The package as it is installed, far from its checkout."""

import os
import shutil
import subprocess
import sys
import zipfile

from .test_cfgnode import YAML
from .test_configs import CONFIGS, ROOT

LOAD = """
import sys, dset_d2
print(dset_d2.__file__)
from detectron2.config import get_cfg
from dset_d2.config import find_config
for path in sys.argv[1:]:
    if path.endswith(".py"):
        assert dset_d2.get_config(path).model, path
    else:
        cfg = get_cfg()
        dset_d2.add_detr_config(cfg)
        cfg.merge_from_file(str(find_config(path)))
"""
TINY = [
    "model.encoder.hidden_dim=32",
    "model.encoder.dim_feedforward=64",
    "model.decoder.hidden_dim=32",
    "model.decoder.dim_feedforward=64",
    "dataloader.image_size=[64,64]",
]


def test_configs_and_tools_work_from_an_installed_wheel(tmp_path):
    source, site, elsewhere = (tmp_path / name for name in ("source", "site", "elsewhere"))
    elsewhere.mkdir()
    # A copy, so that nothing is left in the checkout, nor taken from what a build left there.
    for folder in ("dset_d2", "configs", "projects"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, source)

    def python(*arguments: str) -> str:
        command = [sys.executable, "-W", "ignore", *arguments]
        env = os.environ | {"PYTHONPATH": str(site)}
        result = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    python("-m", "pip", "wheel", *offline, "--wheel-dir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)

    assert python("-c", LOAD, *CONFIGS, *YAML).strip() == str(site / "dset_d2" / "__init__.py")
    config = "projects/dset/configs/dset_r18_roadside.py"
    options = ["--config-file", config, "--device", "cpu", "--rounds", "1"]
    table = python("-m", "dset_d2.tools.benchmark", *options, *TINY)
    assert "dset_r18_roadside" in table and "64 x 64" in table
    assert not list(elsewhere.iterdir())
