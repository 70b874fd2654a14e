import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """What the package says of itself, read without importing it."""
    lines = (ROOT / "dset_d2/__init__.py").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("__version__ ="))
    return ast.literal_eval(line.partition("=")[2].strip())


def config_packages() -> dict[str, str]:
    """Config folders as data packages inside of dset_d2, so that installed copies find them."""
    tops = ("configs", "projects/*/configs")
    folders = [path.parent for top in tops for path in ROOT.glob(f"{top}/**/*.py")]
    names = sorted({folder.relative_to(ROOT).as_posix() for folder in folders})
    return {f"dset_d2.{name.replace('/', '.')}": name for name in names}


setup(
    name="dset_d2",
    version=version(),
    description="Real-time detection transformers with sparse compute, for Detectron2",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords=[
        "object detection",
        "detection transformer",
        "DETR",
        "RT-DETR",
        "D-FINE",
        "DINOv3",
        "Grounding DINO",
        "Detectron2",
        "mixture of experts",
        "token pruning",
        "DAIR-V2X",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["dset_d2", "dset_d2.*"]) + list(config_packages()),
    package_dir=config_packages(),
    package_data={"": ["*.yaml", "py.typed"]},  # configs for Detectron2's CfgNode, and PEP 561's
    entry_points={"console_scripts": ["dset_d2 = dset_d2.__main__:main"]},
    # Detectron2 is not listed, since no index has it: it is installed from its repository. Nor is
    # OpenCV, of which an environment may have one of four distributions and pip cannot ask for
    # "one of them": a listed one would be installed over another and break it. Who has none takes
    # the extra. Importing dset_d2 says which of the two is missing.
    install_requires=[
        # Lower bounds are the oldest that pass the tests, on Python 3.10: `make oldest`.
        "torch>=2.10",  # the first with torch.nn.functional.grouped_mm
        "torchvision>=0.25",
        "numpy>=1.23",
        "scipy>=1.12",
        "Pillow>=10.1",  # older ones turn a TIFF when it is read, and again
        "pycocotools>=2.0.6",
        "matplotlib>=3.5",
        "timm>=1.0.23",  # whose DINOv3 blocks have scales of one name
        "safetensors>=0.4.3",
        "fvcore>=0.1.5.post20221221",
        "omegaconf>=2.2.1,<2.4",
        "hydra-core>=1.2",
        "PyYAML>=5.1",
        "tqdm>=4.60",
        "tabulate",
    ],
    extras_require={
        "opencv": ["opencv-python>=4.5.5.64"],
        # Exported files: writing them, and the two runtimes that run them.
        "export": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20", "openvino>=2025.1"],
        "quantize": ["nncf>=2.19"],  # files in eight bits
        "evaluation": ["faster-coco-eval>=1.6.5"],  # COCO's metrics in C++
        # For Grounding DINO and Qwen3-VL-MoE; nothing else imports it.
        "grounding": ["transformers>=5.23"],
        "test": [
            "pytest>=7",
            "pytest-xdist>=3.7",
            "hypothesis>=6",
            "transformers>=5.23",  # also for comparisons, which follow its names of parameters
            "mypy",
            "ruff",
        ],
    },
)
