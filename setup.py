from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def config_packages() -> dict[str, str]:
    """Config folders as data packages inside of dset_d2, so that installed copies find them."""
    folders = [p.parent for top in ("configs", "projects") for p in ROOT.glob(f"{top}/**/*.py")]
    names = sorted({folder.relative_to(ROOT).as_posix() for folder in folders})
    return {f"dset_d2.{name.replace('/', '.')}": name for name in names}


setup(
    name="dset_d2",
    version="0.1.0",
    description="Real-time detection transformers with sparse compute, for Detectron2",
    python_requires=">=3.10",
    packages=find_packages(include=["dset_d2", "dset_d2.*"]) + list(config_packages()),
    package_dir=config_packages(),
    package_data={"": ["*.yaml"]},  # configs for Detectron2's CfgNode
    # Detectron2 itself is not listed: it is installed from its repository.
    install_requires=[
        "torch>=2.10",  # the first with torch.nn.functional.grouped_mm
        "torchvision>=0.25",
        "numpy>=1.23",
        "scipy>=1.12",
        "Pillow>=9",
        "opencv-python-headless>=4.5",
        "pycocotools>=2.0.6",
        "matplotlib>=3.5",
        "timm>=1.0.20",
        "safetensors>=0.4",
        "fvcore>=0.1.5.post20221221",
        "omegaconf>=2.1,<2.4",
        "hydra-core>=1.1",
        "tqdm>=4.60",
        "tabulate",
    ],
    extras_require={
        "test": ["pytest>=7", "pytest-xdist>=3.7", "hypothesis>=6", "transformers>=4.49", "ruff"]
    },
)
