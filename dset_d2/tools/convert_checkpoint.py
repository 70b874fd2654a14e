"""Convert released weights to a Detectron2 checkpoint, to start training from.

    python -m dset_d2.tools.convert_checkpoint --config-file CONFIG --weights released.pth \\
        --output init.pth

A backbone's ImageNet weights fill the backbone alone. Class heads that do not fit the config's
number of classes stay fresh.
"""

from pathlib import Path

import torch

from ..files import write_atomically
from .common import (
    ConfigToolParser,
    build,
    check_output,
    entry_point,
    load_weights,
    read_config,
)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ConfigToolParser(__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    check_output(args.output, [args.config_file, args.weights])
    model = build(read_config(args.config_file, args.opts), "model")
    load_weights(model, args.weights)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {"model": model.state_dict() | {"clock.steps": torch.tensor(0)}}
    write_atomically(args.output, lambda file: torch.save(checkpoint, file))
    print(f"{args.output}: weights of {args.weights}")


if __name__ == "__main__":
    main()
