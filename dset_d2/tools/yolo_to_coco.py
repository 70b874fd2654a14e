"""Convert a data set in YOLO's folders to COCO annotation files, one for each of its splits.

    python -m dset_d2.tools.yolo_to_coco --input own_data --output own_data/coco
    ... --input own_data/data.yaml --output coco

Images stay where they are. Polygons become the boxes around them.
"""

from pathlib import Path

from ..data.reading import DataError
from ..data.yolo import label_path, load_yolo, read_layout
from .common import ToolParser, UsageError, check_output, entry_point, write_coco


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="its folder or its data.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.json etc.")
    args = parser.parse_args(argv)
    try:
        layout = read_layout(args.input)
        outputs = {split: args.output / f"{split}.json" for split in layout.images}
        images = [image for files in layout.images.values() for image in files]
        inputs = dict.fromkeys(f.parent for image in images for f in (image, label_path(image)))
        for output in outputs.values():
            check_output(output, [layout.file, *inputs])
        datasets = {split: load_yolo(layout, split) for split in outputs}
    except DataError as error:
        raise UsageError(error) from error
    root = layout.file.parent
    for split, dataset in datasets.items():
        write_coco(outputs[split], dataset, layout.classes, root)
    for part, split in (("train", "train"), ("test", "val")):
        if split in outputs:
            node = f"dataloader.{part}.dataset"
            print(f"{node}.json_file={outputs[split]} {node}.image_root={root}")


if __name__ == "__main__":
    main()
