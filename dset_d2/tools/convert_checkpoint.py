"""Convert released weights to a Detectron2 checkpoint, to start training from.

    python -m dset_d2.tools.convert_checkpoint --config-file CONFIG --weights released.pth \\
        --output init.pth

A backbone's ImageNet weights fill the backbone alone. Class heads that do not fit the config's
number of classes stay fresh.
"""

import argparse
from pathlib import Path

import torch
from detectron2.config import instantiate

from ..checkpoint import load_upstream
from ..config import apply_overrides, load_config
from ..files import write_atomically


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("opts", nargs="*", help="overrides of the config")
    args = parser.parse_args(argv)
    model = instantiate(apply_overrides(load_config(args.config_file), args.opts).model)
    try:
        load_upstream(model, args.weights)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {"model": model.state_dict() | {"clock.steps": torch.tensor(0)}}
    write_atomically(args.output, lambda file: torch.save(checkpoint, file))
    print(f"{args.output}: weights of {args.weights}")


if __name__ == "__main__":
    main()
