"""Writing files so that a reader never meets half of one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` with a binary file that becomes ``path`` once it is complete on the disk.

    A failure leaves ``path`` as it was, and no other file.

    Raises:
        OSError: if the disk refuses, e.g. because it is full; names ``path``.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if refusal := disk_error(error):
            raise OSError(refusal.errno, refusal.strerror, str(path)) from None
        raise


def disk_error(error: BaseException | None) -> OSError | None:
    """The disk's own error among those that an error came from; torch hides it behind others."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error
