"""Pictures from wherever they come: files, folders, patterns, videos and streams."""

import glob
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from .reading import DataError, read_image

logger = logging.getLogger(__name__)

IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
STREAM = re.compile(r"[a-z]+://", re.IGNORECASE)
NAMED = 3  # damaged images that a warning names


class Frame(NamedTuple):
    """A picture and where it comes from.

    Attributes:
        source: file or address.
        number: of a video's frames, from 0; None of an image.
        image: (H, W, 3) RGB uint8.
    """

    source: str
    number: int | None
    image: np.ndarray


def is_video(source: str) -> bool:
    """Whether a source is a video or a stream of one, not an image."""
    return bool(STREAM.match(source)) or Path(source).suffix.lower() in VIDEOS


def find_sources(paths: Sequence[str | Path]) -> list[str]:
    """Files, folders and patterns (``photos/*.jpg``) as single sources, in the order of their names;
    addresses of streams (``rtsp://...``) as they are.

    Raises:
        DataError: if there is nothing by one of the names.
    """
    found: list[str] = []
    for path in map(str, paths):
        if STREAM.match(path) or Path(path).is_file():
            found.append(path)
        elif Path(path).is_dir():
            files = sorted(Path(path).iterdir())
            inside = [str(file) for file in files if file.suffix.lower() in IMAGES | VIDEOS]
            if not inside:
                raise DataError(f"{path}: holds no image")
            found += inside
        elif matches := sorted(filter(Path.is_file, map(Path, glob.glob(path, recursive=True)))):
            found += map(str, matches)
        else:
            raise DataError(f"{path}: no such file or folder")
    return found


def count_frames(source: str) -> int | None:
    """The number of a video's frames as its header tells; None if it does not, as of streams."""
    capture = open_video(source)
    try:
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        capture.release()
    return count if count > 0 else None


def read_video(source: str) -> Iterator[Frame]:
    """The frames of a video or stream, until it ends.

    One that ends before its time is warned of.

    Raises:
        DataError: if not a single frame can be read.
    """
    capture = open_video(source)
    number = 0
    try:
        announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        while True:
            there, image = capture.read()
            if not there:
                break
            yield Frame(source, number, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
            number += 1
    finally:
        capture.release()
    if not number:
        raise DataError(f"{source}: cannot read a single frame of this video")
    if number < announced:
        logger.warning("%s: ends after %d of %d frames", source, number, announced)


def open_video(source: str) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        raise DataError(f"{source}: cannot open this video")
    return capture


def read_frames(sources: Sequence[str]) -> Iterator[Frame]:
    """The images and the frames of the videos among sources, one after the other.

    Sources that cannot be read are left out, and counted and named in one warning.

    Raises:
        DataError: if none can be read.
    """
    damaged, before = [], len(sources)
    for source in sources:
        try:
            if is_video(source):
                yield from read_video(source)
            else:
                yield Frame(source, None, read_image(source))
        except (OSError, DataError) as error:
            damaged.append(str(error))
    if damaged:
        named = "; ".join(damaged[:NAMED]) + ("; ..." if len(damaged) > NAMED else "")
        if len(damaged) == before:
            raise DataError(named)
        logger.warning("left out %d of %d images: %s", len(damaged), before, named)
