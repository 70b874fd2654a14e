"""``dset_d2 NAME ...`` is ``python -m dset_d2.tools.NAME ...``."""

import argparse
import ast
import runpy
import sys

from .config import PACKAGE


def find_tools() -> dict[str, str]:
    """Names of the tools, which are the modules that run as scripts, and what each is for."""
    texts = {file.stem: file.read_text() for file in sorted(PACKAGE.glob("tools/*.py"))}
    return {
        name: (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        for name, text in texts.items()
        if 'if __name__ == "__main__":' in text
    }


def main() -> None:
    tools = find_tools()
    parser = argparse.ArgumentParser(
        prog="dset_d2",
        usage="dset_d2 NAME ...",
        description="Run a tool; each has a --help of its own.",
        epilog="\n".join(f"{name:21} {purpose}" for name, purpose in tools.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tool", metavar="NAME", choices=tools)
    name = parser.parse_args(sys.argv[1:2] or ["--help"]).tool
    del sys.argv[1]
    # As python -m would: processes that a tool starts import its module by name.
    runpy.run_module(f"dset_d2.tools.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
