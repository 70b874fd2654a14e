"""The package as it is installed, far from its checkout."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution

import pytest
import yaml

import dset_d2

from .conftest import run_python
from .test_cfgnode import YAML
from .test_configs import CONFIGS, ROOT
from .test_docs import TOOLS

LOAD = """
import runpy, sys, dset_d2
print(dset_d2.__file__)
from detectron2.config import get_cfg
from dset_d2.config import find_config
script, *paths = sys.argv[1:]
for path in paths:
    if path.endswith(".py"):
        assert dset_d2.get_config(path).model, path
    else:
        cfg = get_cfg()
        dset_d2.add_detr_config(cfg)
        cfg.merge_from_file(str(find_config(path)))
sys.argv = [script]
runpy.run_path(script, run_name="__main__")
"""
TINY = [
    "model.encoder.hidden_dim=32",
    "model.encoder.dim_feedforward=64",
    "model.decoder.hidden_dim=32",
    "model.decoder.dim_feedforward=64",
    "dataloader.image_size=[64,64]",
]


def test_what_is_installed_works_far_from_the_checkout(tmp_path):
    source, site, elsewhere = (tmp_path / name for name in ("source", "site", "elsewhere"))
    elsewhere.mkdir()
    # A copy, so that nothing is left in the checkout, nor taken from what a build left there.
    for folder in ("dset_d2", "configs", "projects"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, source)

    def run(*command: str, cwd=elsewhere) -> str:
        env = os.environ | {"PYTHONPATH": str(site), "PYTHONWARNINGS": "ignore"}
        result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    # A wheel of the source distribution, so that this has all that a wheel is made of.
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path), cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    run(*pip, "wheel", *offline, "--wheel-dir", str(tmp_path), str(archive))
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "install", *offline, "--target", str(site), str(wheel))

    (info,) = site.glob("dset_d2-*.dist-info")
    metadata = PathDistribution(info).metadata
    assert metadata["Version"] == dset_d2.__version__ and metadata["License"] == "Apache-2.0"
    assert {file.name for file in info.rglob("*") if file.name in ("LICENSE", "NOTICE")} == {
        "LICENSE",
        "NOTICE",
    }
    assert (site / "dset_d2" / "py.typed").is_file()

    script = str(site / "bin" / "dset_d2")
    place, *text = run(sys.executable, "-c", LOAD, script, *CONFIGS, *YAML).split()
    assert place == str(site / "dset_d2" / "__init__.py") and TOOLS <= set(text)
    config = "projects/dset/configs/dset_r18_roadside.py"
    options = ["--config-file", config, "--device", "cpu", "--rounds", "1"]
    table = run(script, "benchmark", *options, *TINY)
    assert "dset_r18_roadside" in table and "64 x 64" in table
    assert not list(elsewhere.iterdir())


def test_the_console_script_names_the_tools_it_has():
    result = run_python(["-m", "dset_d2", "analyse"], cwd=ROOT, env=dict(os.environ))
    assert result.returncode == 2 and "'analyse'" in result.stderr and "'analyze'" in result.stderr


@pytest.mark.parametrize("module", ["cv2", "detectron2"])
def test_what_pip_does_not_install_is_named(module):
    hide = f"""
import importlib.util as util, sys
find = util.find_spec
util.find_spec = lambda name: None if name == {module!r} else find(name)
import dset_d2
"""
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert "dset_d2 needs Detectron2" in result.stderr and "opencv-python" in result.stderr


def test_citation_names_the_papers_that_the_code_names():
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert all({"type", "title", "authors", "year", "url"} <= set(work) for work in references)
    named = {work["url"] for work in references}
    for file in ROOT.glob("dset_d2/**/*.py"):
        assert set(re.findall(r"https://arxiv.org/abs/[\d.]+\d", file.read_text())) <= named, file


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (newest, *_) = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation["version"] == newest == dset_d2.__version__
