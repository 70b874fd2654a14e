"""Generated scenes as a data set on disk, in DAIR-V2X's single-infrastructure layout."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ..files import write_atomically
from .scenes import SceneObject, check_least, render_scene

CAMERAS = 3  # sites among which the frames of a data set take turns
JPEG_QUALITY = 92
MARKER = "generated.json"
VERSION = 9  # of the drawing: a change makes written data sets stale


def write_dataset(
    root: Path, num_train: int, num_val: int, height: int, width: int, seed: int = 0,
    progress: bool = True,
) -> None:  # fmt: skip
    """Write ``root/dair-v2x`` in DAIR-V2X's single-infrastructure layout.

    Frame i depends on (``seed``, i) and the size in pixels alone; training frames come first. All
    frames are of :data:`CAMERAS` fixed cameras. A data set already written with the same arguments
    is kept, an interrupted one is completed.

    Raises:
        ValueError: for a size that is not positive, or a negative count or seed.
        FileExistsError: when the folder holds a data set that this function did not write.
    """
    check_least(1, height=height, width=width)
    check_least(0, num_train=num_train, num_val=num_val, seed=seed)
    base = Path(root) / "dair-v2x"
    side, marker = base / "single-infrastructure-side", base / MARKER
    wanted = {"version": VERSION, "num_train": num_train, "num_val": num_val, "seed": seed}
    wanted |= {"height": height, "width": width}
    found = json.loads(marker.read_text()) if marker.exists() else None
    if found == wanted | {"complete": True}:
        return
    if found is None and side.exists():
        raise FileExistsError(f"{side} holds a dataset that was not generated; choose another root")
    if found != wanted | {"complete": False}:
        _write(marker, {})  # half deleted is not whole
        shutil.rmtree(side, ignore_errors=True)
    _write(marker, wanted | {"complete": False})

    names = [f"{index:06d}" for index in range(num_train + num_val)]
    bar = tqdm(names, desc="drawing scenes", unit="frame", disable=not progress)
    for index, name in enumerate(bar):
        label = side / "label" / "camera" / f"{name}.json"
        if label.exists():  # written after its image
            continue
        scene = render_scene(frame_seed(seed, index), height, width, camera_seed(seed, index))
        quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        code = cv2.imencode(".jpg", scene.image[..., ::-1], quality)[1]
        _write(side / "image" / f"{name}.jpg", code.tobytes())
        _write(label, [to_dair(item) for item in scene.objects])
    paths = ("image_path", "image/{}.jpg"), ("label_camera_std_path", "label/camera/{}.json")
    records = [{key: path.format(name) for key, path in paths} for name in names]
    _write(side / "data_info.json", records)
    split = {"train": names[:num_train], "val": names[num_train:], "test": []}
    _write(base / "split_datas" / "single-infrastructure-split-data.json", split)
    _write(marker, wanted | {"complete": True})


def frame_seed(seed: int, index: int) -> int:
    """Seed of frame ``index`` for :func:`render_scene`, independent of the number of frames."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def camera_seed(seed: int, index: int) -> int:
    """Site of frame ``index``: a few fixed cameras take turns, as at a real crossing."""
    return int(np.random.SeedSequence([seed, index % CAMERAS, 1]).generate_state(1, np.uint64)[0])


def to_dair(item: SceneObject) -> dict:
    """An entry of a DAIR-V2X label file, whose numbers are strings."""

    def named(keys: str, values: tuple[float, ...]) -> dict[str, str]:
        return {key: f"{value:.5f}" for key, value in zip(keys.split(), values, strict=True)}

    return {
        "type": item.category,
        "truncated_state": str(item.truncated_state),
        "occluded_state": str(item.occluded_state),
        "2d_box": named("xmin ymin xmax ymax", item.box),
        "3d_dimensions": named("l w h", item.dimensions),
        "3d_location": named("x y z", item.location),
        "rotation": f"{item.rotation:.5f}",
    }


def _write(path: Path, content: bytes | list | dict) -> None:
    """Write bytes, or anything else as JSON."""
    data = content if isinstance(content, bytes) else json.dumps(content, indent=1).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(data))
