"""Files that are never half-written, also when the disk is full."""

import errno

import pytest
import torch

from dset_d2.files import write_atomically


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 10_000])
def test_full_disk_leaves_what_was_there(room, tmp_path):
    path = tmp_path / "model.pth"
    write_atomically(path, lambda file: file.write(b"before"))
    weights = {"weight": torch.zeros(100_000)}
    with pytest.raises(OSError, match="No space left on device: '.*model.pth'") as caught:
        write_atomically(path, lambda file: torch.save(weights, FullDisk(file, room)))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_other_failures_stay_as_they_are(tmp_path):
    def fail(file) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "model.pth", fail)
    assert not list(tmp_path.iterdir())
