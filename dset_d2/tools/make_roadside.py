"""Generate roadside scenes in DAIR-V2X's layout: python -m dset_d2.tools.make_roadside."""

import json
from pathlib import Path

import cv2
import numpy as np

from dset_d2.synthetic import write_dataset

from .common import ToolParser, UsageError, entry_point


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder that gets dair-v2x/")
    parser.add_argument("--train", type=int, default=300, help="training frames")
    parser.add_argument("--val", type=int, default=60, help="validation frames")
    parser.add_argument("--height", type=int, default=288, help="pixels")
    parser.add_argument("--width", type=int, default=512, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preview", type=Path, help="contact sheet of validation frames (image)")
    args = parser.parse_args(argv)
    try:
        write_dataset(args.output, args.train, args.val, args.height, args.width, args.seed)
    except (ValueError, FileExistsError) as error:
        raise UsageError(error) from error
    print(f"{args.train} train and {args.val} val frames in {args.output / 'dair-v2x'}")
    if args.preview:
        sheet = contact_sheet(args.output)
        args.preview.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(args.preview), sheet[..., ::-1]):
            raise OSError(f"cannot write {args.preview}")
        print(f"preview in {args.preview}")


def contact_sheet(root: Path, frames: int = 12, columns: int = 3) -> np.ndarray:
    """The first validation frames of a written dataset with their boxes and types.

    Returns:
        (rows * H, columns * W, 3) uint8 RGB.

    Raises:
        ValueError: when there is no validation frame.
    """
    base = root / "dair-v2x"
    split = json.loads((base / "split_datas" / "single-infrastructure-split-data.json").read_text())
    side = base / "single-infrastructure-side"
    tiles = [_annotated(side, name) for name in split["val"][:frames]]
    if not tiles:
        raise ValueError(f"{base} has no val frame to preview")
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def _annotated(side: Path, name: str) -> np.ndarray:
    image = cv2.imread(str(side / "image" / f"{name}.jpg"))[..., ::-1].copy()
    for item in json.loads((side / "label" / "camera" / f"{name}.json").read_text()):
        corners = (round(float(item["2d_box"][k])) for k in ("xmin", "ymin", "xmax", "ymax"))
        x0, y0, x1, y1 = corners
        # green, amber, red: hidden not at all, by less than half, by more
        colour = [(60, 230, 60), (255, 190, 0), (255, 60, 60)][int(item["occluded_state"])]
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, 1)
        where = (x0, max(9, y0 - 2))
        cv2.putText(image, item["type"], where, cv2.FONT_HERSHEY_SIMPLEX, 0.32, colour, 1,
                    cv2.LINE_AA)  # fmt: skip
    return image


if __name__ == "__main__":
    main()
