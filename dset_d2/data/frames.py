"""Pictures from wherever they come: files, folders, patterns, videos and streams."""

import glob
import logging
import re
from collections.abc import Callable, Iterator, Sequence, Set
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


def find_sources(paths: Sequence[str | Path], kinds: Set[str] = IMAGES | VIDEOS) -> list[str]:
    """Files, folders and patterns (``photos/*.jpg``) as single sources, in order of their names;
    addresses of streams (``rtsp://...``) as they are.

    Args:
        kinds: suffixes of the files of a folder that are sources.

    Raises:
        DataError: if there is nothing by one of the names.
    """
    found: list[str] = []
    for path in map(str, paths):
        if STREAM.match(path) or Path(path).is_file():
            found.append(path)
        elif Path(path).is_dir():
            files = sorted(Path(path).iterdir())
            inside = [str(file) for file in files if file.suffix.lower() in kinds]
            if not inside:
                raise DataError(f"{path}: holds no image")
            found += inside
        elif matches := sorted(filter(Path.is_file, map(Path, glob.glob(path, recursive=True)))):
            found += map(str, matches)
        else:
            raise DataError(f"{path}: no such file or folder")
    return found


class VideoHeader(NamedTuple):
    """What a video says of itself; 0 and a usual rate where it says nothing, as streams do."""

    frames: int
    rate: float  # frames per second


def read_header(source: str) -> VideoHeader:
    """
    Raises:
        DataError: if it cannot be opened.
    """
    capture = open_video(source)
    frames, rate = (capture.get(x) for x in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
    capture.release()
    return VideoHeader(max(0, int(frames)), rate if 0 < rate < 1000 else 25.0)


def read_video(source: str, warn: Callable[[str], object]) -> Iterator[Frame]:
    """The frames of a video or stream, until it ends; of one that ends early ``warn`` is told.

    Raises:
        DataError: if not a single frame can be read.
    """
    announced, number = read_header(source).frames, 0
    capture = open_video(source)
    try:
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
        warn(f"{source}: ends after {number} of {announced} frames")


def open_video(source: str) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        raise DataError(f"{source}: cannot open this video")
    return capture


def read_frames(
    sources: Sequence[str], warn: Callable[[str], object] = logger.warning
) -> Iterator[Frame]:
    """The images and the frames of the videos among sources, one after the other.

    Sources that cannot be read are left out, and counted and named in one warning.

    Args:
        warn: what a warning is given to.

    Raises:
        DataError: if none can be read.
    """
    damaged = []
    for source in sources:
        try:
            if is_video(source):
                yield from read_video(source, warn)
            else:
                yield Frame(source, None, read_image(source))
        except (OSError, DataError) as error:
            damaged.append(str(error))
    if damaged:
        named = "; ".join(damaged[:NAMED]) + ("; ..." if len(damaged) > NAMED else "")
        if len(damaged) == len(sources):
            raise DataError(named)
        warn(f"left out {len(damaged)} of {len(sources)} images: {named}")
