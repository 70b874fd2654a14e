"""The folder of a run: what a run leaves in it, and that one run at a time writes there."""

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ..config import nearest

logger = logging.getLogger(__name__)

CONFIG, LAST = "config.yaml", "last_checkpoint"
WEIGHTS = re.compile(r"model_(\d{7}|best|final)\.pth(\.tmp)?")

REPORTED = re.compile(r"report_\w+\.(png|jpg)")


def written(folder: Path) -> list[Path]:
    """The files of a run, by names that nothing else should have; the log goes on."""
    names = (CONFIG, LAST, "metrics.json", "report.md", "report.json")
    return [
        path
        for path in folder.glob("*")
        if path.name in names
        or WEIGHTS.fullmatch(path.name)
        or path.name.startswith("events.out.tfevents.")
        or REPORTED.fullmatch(path.name)
    ]


@contextmanager
def claimed(folder: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """Give a folder to one run, and keep others out of it until the process ends, however it does.

    No run is lost or mixed with another. One that was killed before its first checkpoint starts
    anew when it is resumed. But where no run ever was there is nothing to resume: the folder's
    name is likely a mistake.

    Raises:
        ValueError: if another process has the folder, if it holds a run that shall neither go on
            nor be replaced, or none that could be resumed.
    """
    # Metrics and events alone are of one that failed at its first step.
    marks = {p.name for p in written(folder) if p.suffix in (".yaml", ".pth") or p.name == LAST}
    if resume and not marks:
        runs = [path.parent.name for path in folder.absolute().parent.glob(f"*/{LAST}")]
        raise ValueError(f"{folder} holds no run to resume{nearest(folder.name, runs)}")
    if resume and LAST not in marks and "model_best.pth" in marks:
        raise ValueError(
            f"{folder} holds no checkpoint to resume from, but model_best.pth: "
            "start from that in another folder, or replace it by --overwrite"
        )
    if marks and not (resume or overwrite):
        raise ValueError(f"{folder} holds a run: --resume goes on with it, --overwrite replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        lock(file)
        if resume and LAST not in marks:
            logger.warning("%s: the run has no checkpoint yet; it starts anew", folder)
        yield


def lock(file: TextIO) -> None:
    """Lock a file until it is closed or the process ends, and write the process's number to it."""
    try:
        # Of the process alone: data-loading workers that outlive it hold no part of the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        folder = Path(file.name).parent
        raise ValueError(f"{folder}: process {file.read()} is writing a run here") from None
    except OSError as error:  # of file systems that have no locks
        logger.warning("%s: no lock against other runs: %s", file.name, error.strerror)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
