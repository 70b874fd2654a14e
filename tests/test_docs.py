"""Commands that the documentation shows are ones that the tools take."""

import argparse
import json
import re
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from dset_d2.tools.common import read_config

from .test_configs import ROOT

COMMAND = re.compile(r"(\w+=\S+ )?python -m dset_d2\.tools\.(\w+)")
TOOLS = {file.stem for file in ROOT.glob("dset_d2/tools/*.py")} - {
    "__init__",
    "common",
    "preparation",
}
READMES = [ROOT / "README.md", *sorted(ROOT.glob("projects/*/README.md"))]
PLACEHOLDERS = {"CONFIG", "OTHER"}
ONE_IMAGE = {
    "images": [{"id": 1, "file_name": "x.jpg", "height": 4, "width": 5}],
    "annotations": [],
    "categories": [{"id": 1, "name": "car"}],
}


def find_commands(text: str) -> list[str]:
    """Commands of tools, each a whole one; a line that begins with ``...`` adds to the last one."""
    found, whole = [], ""
    lines = iter(text.splitlines())
    for line in map(str.strip, lines):
        if COMMAND.match(line):
            whole = line
            while whole.endswith("\\") or whole.count('"') % 2:
                whole += "\n" + next(lines)
            found.append(whole)
        elif line.startswith("... ") and whole:
            options = re.split(" {3,}", line[4:])[0]  # what they do may stand beside them
            found.append(f"{whole} {options}")
    return found


def documents() -> list:
    """Pairs of a folder that configs may be named from, beside the root, and a command."""
    texts = {
        file.relative_to(ROOT).as_posix(): (file.parent / "configs", file.read_text())
        for file in READMES
    }
    for tool in sorted(TOOLS):
        texts[tool] = (ROOT, import_module(f"dset_d2.tools.{tool}").__doc__)
    return [
        pytest.param(folder, command, id=f"{name}-{index}")
        for name, (folder, text) in texts.items()
        for index, command in enumerate(find_commands(text))
    ]


class Parsed(Exception):
    """Ends a tool once it has understood its command line."""


@pytest.mark.parametrize("folder, command", documents())
def test_documented_commands_are_taken(folder, command, monkeypatch, tmp_path):
    shell = f"set -f; python() {{ printf '%s\\0' \"$@\"; }}; {command}"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    _, module, *words = result.stdout.split("\0")[:-1]
    tool = import_module(module)
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(parse(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as parsed:
        getattr(tool, "run", tool.main)(words)  # the launcher's, which starts processes of its main
    (args,) = parsed.value.args
    if "config_file" not in args:
        return
    files = args.config_file if isinstance(args.config_file, list) else [args.config_file]
    monkeypatch.chdir(tmp_path)  # where the documents' files of a user's data are
    for name in ("train.json", "val.json"):
        Path(name).write_text(json.dumps(ONE_IMAGE))
    runs = [(file, args.opts) for file in files]
    for variant in vars(args).get("variant", []):
        runs.append((variant.config_file or files[0], [*variant.overrides, *args.opts]))
    for file, overrides in runs:
        if file not in PLACEHOLDERS:
            near = folder / file
            read_config(str(near) if near.is_file() else file, overrides)


def test_every_tool_is_shown():
    shown = {COMMAND.match(command)[2] for command in find_commands(READMES[0].read_text())}
    assert shown == TOOLS
