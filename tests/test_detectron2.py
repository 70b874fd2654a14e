"""The Detectron2 that the tests run on, and the installer for machines without one."""

import sys
import zipfile
from pathlib import Path

import detectron2
import pytest
from detectron2.config import LazyCall, LazyConfig
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.backbone.build import BACKBONE_REGISTRY as SAME_REGISTRY

import dset_d2
from dset_d2.modeling import DETRDetector, PResNet

sys.path.insert(0, str(Path(__file__).parents[1] / "third_party/detectron2"))
import install  # noqa: E402


def test_one_set_of_modules_with_true_names():
    names = [name for name in sys.modules if "detectron2" in name]
    assert not [name for name in names if "LabGym" in name]
    for name in names:
        if name.startswith("detectron2.") and not name.startswith("detectron2._cfg_loader"):
            assert sys.modules[name].__name__ == name


def test_no_source_speaks_of_the_wheel():
    sources = Path(detectron2.__file__).parent.rglob("*.py")
    assert not [path for path in sources if b"LabGym" in path.read_bytes()]


def test_registries_are_shared():
    assert BACKBONE_REGISTRY is SAME_REGISTRY
    assert BACKBONE_REGISTRY.get("PResNet") is PResNet
    assert META_ARCH_REGISTRY.get("DETRDetector") is DETRDetector


def test_saved_configs_name_detectron2(tmp_path):
    from detectron2.modeling import ResNet

    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_coco.py")
    LazyConfig.save(cfg, str(tmp_path / "data.yaml"))
    text = (tmp_path / "data.yaml").read_text()
    assert "detectron2.evaluation.COCOEvaluator" in text and "LabGym" not in text
    LazyConfig.save(LazyCall(ResNet)(stages=[]), str(tmp_path / "model.yaml"))
    assert "detectron2.modeling" in (tmp_path / "model.yaml").read_text()


def test_installer_takes_the_folder_alone_and_restores_names(tmp_path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("LabGym/gui.py", "gpl = True")
        archive.writestr("LabGym/detectron2/__init__.py", "")
        source = "from LabGym.detectron2.utils import x\nname = 'LabGym.detectron2.engine'\n"
        archive.writestr("LabGym/detectron2/data/y.py", source)
    install.extract(wheel, tmp_path / "src")
    files = sorted(p.relative_to(tmp_path / "src").as_posix() for p in tmp_path.glob("src/**/*.py"))
    assert files == ["detectron2/__init__.py", "detectron2/data/y.py"]
    restored = (tmp_path / "src/detectron2/data/y.py").read_text()
    assert restored == "from detectron2.utils import x\nname = 'detectron2.engine'\n"


def test_installer_leaves_an_existing_detectron2_alone(monkeypatch, capsys):
    monkeypatch.setattr(install, "pip", lambda *_: pytest.fail("would install over it"))
    install.main()
    assert "already installed" in capsys.readouterr().out
