"""Images, folders, patterns and videos as one stream of pictures."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dset_d2.data.frames import find_sources, is_video, read_frames, read_header
from dset_d2.data.reading import DataError


def photo(path: Path, grey: int = 100) -> Path:
    Image.fromarray(np.full((32, 48, 3), grey, np.uint8)).save(path)
    return path


def video(path: Path, frames: int = 5, rate: float = 10.0) -> Path:
    """Frames that become brighter, redder than they are blue."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, (64, 48))
    assert writer.isOpened()
    for index in range(frames):
        writer.write(np.full((48, 64, 3), (0, 20 * index, 200), np.uint8))  # BGR
    writer.release()
    return path


def test_sources_in_order(tmp_path, monkeypatch):
    for name in ("b.png", "a.JPG", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "z.mp4").touch()
    assert [Path(x).name for x in find_sources([tmp_path])] == ["a.JPG", "b.png", "z.mp4"]
    monkeypatch.chdir(tmp_path)
    assert find_sources(["*.png", "rtsp://camera/1", "c.txt"]) == [
        "b.png",
        "rtsp://camera/1",
        "c.txt",
    ]
    for missing in ("no.png", "*.gif"):
        with pytest.raises(DataError, match="no such file or folder"):
            find_sources([missing])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no image"):
        find_sources(["empty"])


def test_videos_are_known_by_name():
    assert is_video("a/b.MP4") and is_video("rtsp://10.0.0.1/stream") and is_video("http://x/y")
    assert not is_video("a/b.jpg") and not is_video("photo")


def test_frames_of_videos_and_images(tmp_path):
    sources = [str(photo(tmp_path / "a.png")), str(video(tmp_path / "b.avi"))]
    frames = list(read_frames(sources))
    assert [frame.number for frame in frames] == [None, 0, 1, 2, 3, 4]
    assert [frame.source for frame in frames] == sources[:1] + sources[1:] * 5
    assert frames[0].image.shape == (32, 48, 3) and frames[1].image.shape == (48, 64, 3)
    red, green, blue = frames[3].image.reshape(-1, 3).mean(0)
    assert red > 180 and 25 < green < 55 and blue < 30
    assert read_header(sources[1]) == (5, 10.0)


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path):
    good, bad, odd = tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "odd.mp4"
    photo(good)
    bad.write_bytes(b"no image")
    odd.write_bytes(b"no video")
    told: list[str] = []
    frames = list(read_frames([str(bad), str(good), str(odd)], told.append))
    assert [frame.source for frame in frames] == [str(good)]
    (text,) = told
    assert text.startswith(f"left out 2 of 3 images: {bad}: cannot read this image")
    assert f"{odd}: cannot open this video" in text
    with pytest.raises(DataError, match="bad.png: cannot read this image"):
        list(read_frames([str(bad)]))


def test_a_video_that_ends_early_is_told(tmp_path):
    path = video(tmp_path / "cut.avi", frames=40)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    told: list[str] = []
    frames = list(read_frames([str(path)], told.append))
    assert 0 < len(frames) < 40
    if read_header(str(path)).frames > len(frames):  # some containers tell the number at their end
        assert told == [f"{path}: ends after {len(frames)} of 40 frames"]
