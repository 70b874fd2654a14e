"""Convert one side and split of DAIR-V2X to a COCO annotation file.

    python -m dset_d2.tools.dair_v2x_to_coco --output val.json \\
        --root dair-v2x/single-infrastructure-side \\
        --split-file dair-v2x/split_datas/single-infrastructure-split-data.json --split val

For the cooperative set add --split-key infrastructure_split (or vehicle_split).
"""

from pathlib import Path

from ..data.dair_v2x import CLASSES_8, CLASSES_10, SPLITS, DataError, load_dair_v2x
from .common import ToolParser, UsageError, check_output, entry_point, write_coco


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the side's folder")
    parser.add_argument("--split-file", type=Path, required=True)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--split-key", action="append", default=[], metavar="KEY")
    parser.add_argument("--image-root", type=Path, help="where image/ lies, if not in the root")
    parser.add_argument("--classes", type=int, choices=(8, 10), default=8)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    parts = [args.root / "data_info.json", args.root / "label", args.root / "image"]
    check_output(args.output, [args.split_file, *parts])
    classes = CLASSES_8 if args.classes == 8 else CLASSES_10
    try:
        dataset = load_dair_v2x(
            args.root, args.split_file, args.split, tuple(args.split_key), classes, args.image_root
        )
    except DataError as error:
        raise UsageError(error) from error
    write_coco(args.output, dataset, classes, args.image_root or args.root)


if __name__ == "__main__":
    main()
