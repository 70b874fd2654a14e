"""Install Detectron2 0.6 from the package index into the running Python environment.

The index has no ``detectron2`` distribution, but the ``labgym`` wheel carries Detectron2's
pure-Python sources as ``LabGym.detectron2``. This script takes that folder alone out of the
wheel, gives every module its true name back, and installs it as a normal ``detectron2`` package.
The README beside this file says why, and states the licences.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "labgym==3.1.2"
FOLDER = "LabGym/detectron2/"
SETUP = """
from setuptools import find_namespace_packages, setup

setup(
    name="detectron2",
    version="0.6",
    license="Apache-2.0",
    packages=find_namespace_packages(include=["detectron2*"]),
    package_data={"": ["*.yaml", "*.py"]},
)
"""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def extract(wheel: Path, target: Path) -> None:
    """Write the wheel's Detectron2 sources to ``target/detectron2`` under their true names."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.startswith(FOLDER) or name.endswith("/"):
                continue
            path = target / "detectron2" / name[len(FOLDER) :]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name).replace(b"LabGym.detectron2", b"detectron2"))


def main() -> None:
    if importlib.util.find_spec("detectron2"):
        print("detectron2 is already installed; leaving it as it is")
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--no-deps", "--ignore-requires-python", "--quiet", "--dest", folder)
        pip("download", WHEEL, *flags)
        extract(next(Path(folder).glob("*.whl")), Path(folder, "src"))
        Path(folder, "src", "setup.py").write_text(SETUP)
        pip("install", "--quiet", "--no-deps", "--no-build-isolation", f"{folder}/src")
    print("installed detectron2 0.6 (pure Python)")


if __name__ == "__main__":
    main()
