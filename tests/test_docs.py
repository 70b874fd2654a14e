"""Commands that the documentation shows are ones that the tools take, its code runs, and the
messages that it explains are those that the package gives."""

import argparse
import ast
import json
import os
import re
import subprocess
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

import dset_d2
from dset_d2.__main__ import find_tools
from dset_d2.tools.common import read_config

from .conftest import run_python
from .test_configs import ROOT

COMMAND = re.compile(r"(\w+=\S+ )?(python|torchrun \S+) -m dset_d2\.tools\.(\w+)")
# Other lines of a shell: what they do is not the package's, or is tested elsewhere.
SHELL = re.compile(
    r"pip install|make |cd |export |OMP_NUM_THREADS=1 .venv/bin/python -m pytest"
    r"|(OMP_NUM_THREADS=1 )?python projects/\w+/\w+\.py"
)
SCRIPT = re.compile(r"^    (python - .*<<'E'\n(?:.*\n)*?    E)$", re.M)
TOOLS = set(find_tools())
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted(ROOT.glob("projects/*/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "third_party/detectron2/README.md",
]
PLACEHOLDERS = {"CONFIG", "OTHER", "..."}
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
        for file in PAGES
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
    put = "{ printf '%s\\0' \"$@\"; }"
    shell = f"set -f; python() {put}; torchrun() {put}; {command}"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    words = result.stdout.split("\0")[:-1]
    module, *words = words[words.index("-m") + 1 :]
    tool = import_module(module)
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(parse(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as parsed:
        getattr(tool, "run", tool.main)(words)  # the launcher's, which starts processes of its main
    (args,) = parsed.value.args
    if vars(args).get("config_file") is None:
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
    shown = {COMMAND.match(command)[3] for command in find_commands(PAGES[0].read_text())}
    assert shown == TOOLS


def shell_lines(text: str) -> list[str]:
    """The lines of a page's indented blocks, those that go on joined, without scripts."""
    blocks, fenced, before = [], False, ""
    for line in SCRIPT.sub("", text).splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("    ") and not fenced:
            if not before.startswith("    "):
                blocks.append("")
            blocks[-1] += line + "\n"
        before = line
    commands = "".join(block for block in blocks if not block.lstrip().startswith("dair-v2x/\n"))
    joined = re.sub(r'\\\n|"[^"]*"', " ", commands)
    return [line.strip() for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_line_of_a_shell_is_left_unread(page):
    """Each is a tool's, one of a few others, or goes on with the one before."""
    for line in shell_lines(page.read_text()):
        assert COMMAND.match(line) or SHELL.match(line) or line.startswith("... "), line


SCRIPTS = [script for page in PAGES for script in SCRIPT.findall(page.read_text())]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run(script, tmp_path):
    file = tmp_path / "script.py"
    put = f"{{ cat > {file}; printf '%s\\0' \"$@\"; }}"
    shell = f"python() {put}; {textwrap.dedent('    ' + script)}"
    words = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    _, *words = words.stdout.split("\0")[:-1]
    result = run_python([str(file), *words], cwd=ROOT, env=dict(os.environ))
    assert result.returncode == 0 and re.search(r"\d M|\d MiB", result.stdout), result.stderr


def test_targets_of_make_exist():
    named = {
        target
        for page in PAGES
        for target in re.findall(r"(?:^    |`)make (?:\w+=\w+ )?(\w+)", page.read_text(), re.M)
    }
    assert len(named) >= 5
    subprocess.run(["make", "-n", *named], cwd=ROOT, check=True, capture_output=True)


def test_code_of_the_readme_runs(tmp_path, monkeypatch):
    """On random weights in place of the released ones, and small noise in place of images."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text(), re.S | re.M)
    usage = [block for block in blocks if "class " not in block]
    monkeypatch.chdir(tmp_path)
    sparse = dset_d2.get_config("projects/dset/configs/dset_r18_memory_dair_v2x.py").model
    plain = instantiate(dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_coco.py").model)
    state = {k: v for k, v in plain.state_dict().items() if not k.startswith("clock.")}
    torch.save({"ema": {"module": state}}, "rtdetrv2_r18vd_120e_coco.pth")
    image = torch.randint(256, (3, 60, 90), dtype=torch.uint8)
    names = {
        "image": image,
        "images": torch.rand(2, 3, 64, 96),
        "batched_inputs": [{"image": image}] * 2,
    }
    exec(usage[0], names)
    names["model"] = instantiate(sparse).eval()  # knobs are of sparse models
    with torch.no_grad():
        exec(usage[1], names)
    assert names["encoded"] and len(usage) == 2


MESSAGES = re.compile(r"^\| (`.*?) \| |^\*\*(`[^*]*`)", re.M)


def messages() -> list[str]:
    """What the page on troubleshooting quotes of the package's messages."""
    text = (ROOT / "docs/troubleshooting.md").read_text().partition("## Config")[2]
    quoted = (a or b for a, b in MESSAGES.findall(text))
    return [message for cell in quoted for message in re.findall("`([^`]*)`", cell)]


@pytest.mark.parametrize("message", messages())
def test_explained_messages_are_given(message):
    strings = {
        node.value
        for file in ROOT.glob("dset_d2/**/*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for part in filter(None, map(str.strip, message.split("..."))):
        assert any(part in string for string in strings), part
