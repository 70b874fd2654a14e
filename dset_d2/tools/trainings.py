"""Trainings in processes of their own, one after the other or side by side, that go on where they
were ended."""

import functools
import json
import operator
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .common import UsageError, write_json
from .plot_curves import read_metrics

POLL = 0.2  # seconds between looks at the processes
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Run(NamedTuple):
    """One training: a variant with a seed."""

    config_file: str
    overrides: list[str]
    folder: Path


def claim(run: Run) -> None:
    """Note the run's settings in its folder.

    Raises:
        UsageError: if the folder holds another run.
    """
    file = run.folder / "settings.json"
    settings = {"config": run.config_file, "overrides": run.overrides}
    if (run.folder / "last_checkpoint").exists():
        if not file.exists() or json.loads(file.read_text()) != settings:
            raise UsageError(f"{run.folder} holds a run with other settings, see {file}")
    else:
        write_json(file, settings)


def usable_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def train(runs: list[Run], device: str | None = None, jobs: int = 1) -> None:
    """Train runs, or what is left of them; those that are finished are left alone.

    Args:
        jobs: how many side by side, each with one thread on a core of its own; a single one has
            all threads that it wants.

    Raises:
        RuntimeError: as soon as one fails. The others are ended, and resumed by the next call.
    """
    waiting = deque(run for run in runs if not final_metrics(run.folder))
    free: list[int | None] = [None] if jobs == 1 else [*usable_cores()[:jobs]]
    running: dict[int | None, tuple[Run, subprocess.Popen]] = {}  # by core
    # Finished ones take no part in the rate, from which the time left is estimated.
    done = len(runs) - len(waiting)
    with tqdm(total=len(runs), initial=done, desc="training", unit="run") as bar:
        try:
            while waiting or running:
                while waiting and free:
                    core, run = free.pop(0), waiting.popleft()
                    running[core] = run, start(run, device, core)
                time.sleep(POLL)
                for core, (run, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[core]
                    free.append(core)
                    check_end(run, process.returncode)
                    bar.update()
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()


def start(run: Run, device: str | None, core: int | None) -> subprocess.Popen:
    """Begin a run, or go on with it, by our launcher.

    Args:
        core: to which it is bound, with one thread; None: it may use all there is.
    """
    config_file, overrides, folder = run
    command = [sys.executable, "-W", "ignore", "-m", "dset_d2.tools.lazyconfig_train_net"]
    begun = (folder / "last_checkpoint").exists()
    command += ["--config-file", config_file, "--resume" if begun else "--overwrite"]
    command += [
        "train.report=false",
        *overrides,
        f"train.output_dir={json.dumps(str(folder), ensure_ascii=False)}",
    ]
    command += [f"train.device={device}"] if device else []
    env, bind = None, None
    if core is not None:
        env = os.environ | ONE_THREAD
        if hasattr(os, "sched_setaffinity"):
            bind = functools.partial(os.sched_setaffinity, 0, {core})
    with open(folder / "stdout.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, preexec_fn=bind)


def check_end(run: Run, status: int) -> None:
    """Raise a RuntimeError unless the run whose process ended so is finished."""
    log = run.folder / "stdout.txt"
    if status:
        raise RuntimeError(f"training failed; {log} says why")
    if not final_metrics(run.folder):
        raise RuntimeError(f"no evaluation at the end; {log} may say why")


def final_metrics(folder: Path) -> dict[str, float] | None:
    """The last value of every metric of a run whose last iteration was evaluated, else None.

    The last checkpoint alone may stand before that evaluation, and a metric before the last
    checkpoint.
    """
    file = folder / "metrics.json"
    if not file.exists() or not (folder / "model_final.pth").exists():
        return None
    # A run that was resumed may have logged an iteration twice: the later attempt counts.
    rows = sorted(read_metrics(file), key=lambda row: row["iteration"])
    last = [row for row in rows if row["iteration"] == rows[-1]["iteration"]]
    if not any("bbox/AP" in row for row in last):
        return None
    return functools.reduce(operator.or_, rows)
