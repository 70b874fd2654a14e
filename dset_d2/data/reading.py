"""Files of data sets: errors that name them, JSON, and images upright and in eight bits."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

T = TypeVar("T")
ORIENTATION = 0x0112  # EXIF's tag for how the camera was held
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width


class DataError(ValueError):
    """A data set's file is missing or wrong; the message names the file and the entry."""


class UnreadableImage(DataError):
    """A file is damaged, or no image."""


def read_json(path: str | Path, kind: type[T]) -> T:
    """Parse a JSON file whose top level must be ``kind``."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, kind):
        raise DataError(f"{path}: expected a {kind.__name__}, found {type(content).__name__}")
    return content


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read an image as (H, W, 3) RGB uint8, judged by its bytes, not by its suffix.

    It is turned upright as its EXIF data say, unless ``size`` tells that its boxes were drawn on
    the image as it is stored. 16-bit grey becomes 8-bit as 16-bit colour does: full scale is white.

    Args:
        size: the (height, width) that the image's record gives it.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableImage: if it is no image or is damaged.
        DataError: if its size is another, or which of its values is white cannot be known.
    """
    with _opened(path) as image:
        image.load()
        turn = TURNS.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        if size in (None, _size(upright)):
            image = upright
        elif size != _size(image):
            raise _wrong_size(path, _size(upright), size)
        return np.asarray(_in_eight_bits(image, path).convert("RGB"))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) as the image is stored, from the file's header."""
    with _opened(path) as image:
        return _size(image)


def upright_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the image turned as its EXIF data say, from the file's header."""
    with _opened(path) as image:
        size = _size(image)
        return size[::-1] if _orientation(image) in SIDEWAYS else size


def check_header(path: str | Path, size: tuple[int, int] | None) -> None:
    """Raise what :func:`read_image` would raise for what a file's header tells."""
    with _opened(path) as image:
        stored = _size(image)
        # Asked for only where it matters: it makes Pillow decode all of a PNG file.
        if size not in (None, stored):
            upright = stored[::-1] if _orientation(image) in SIDEWAYS else stored
            if size != upright:
                raise _wrong_size(path, upright, size)
        if image.mode == "F":
            raise _unknown_white(path, "floating-point")


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with PathManager.open(str(path), "rb") as file, Image.open(file) as image:
            yield image
    except (FileNotFoundError, DataError):
        raise
    except Exception as error:  # Pillow raises many kinds
        raise UnreadableImage(f"{path}: cannot read this image: {error}") from error


def _size(image: Image.Image) -> tuple[int, int]:
    return image.height, image.width


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns these, and only these, itself
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data say nothing, and the image may be sound
        return 1


def _in_eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """The image, or its most significant bits if it is 16-bit grey; Pillow would clip these."""
    if image.mode == "F":
        raise _unknown_white(path, "floating-point")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    # Sensors of 12 bits and fewer leave the upper ones empty: the image would become black.
    if low < 0 or high > 65535 or 0 < high < 4096:
        raise _unknown_white(path, f"integer, from {low} to {high}")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _unknown_white(path: str | Path, values: str) -> DataError:
    return DataError(
        f"{path}: pixels are {values}, which does not tell the value of white; "
        f"convert the image to 8 bits"
    )


def _wrong_size(path: str | Path, found: tuple[int, int], size: tuple[int, int]) -> DataError:
    sizes = [f"{width} x {height}" for height, width in (found, size)]
    return DataError(f"{path}: the image is {sizes[0]}, its record says {sizes[1]}")
