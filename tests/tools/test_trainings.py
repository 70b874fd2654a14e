import json
import os
from pathlib import Path

import pytest

from dset_d2.tools.trainings import Run, claim, train, usable_cores

# Configs are code: the launcher that reads them tells of its process.
NOTE = """
import json, os, pathlib, time
here = pathlib.Path(__file__).parent
note = dict(pid=os.getpid(), threads=[os.environ[f"{x}_NUM_THREADS"] for x in ("OMP", "MKL")])
if hasattr(os, "sched_getaffinity"):
    note["cores"] = list(os.sched_getaffinity(0))
(here / "NAME.tmp").write_text(json.dumps(note))
(here / "NAME.tmp").rename(here / "NAME.json")
"""
WAIT = """
while not (here / "other.json").exists():
    time.sleep(0.05)
raise RuntimeError("of no use")
"""


@pytest.mark.skipif(len(usable_cores()) < 2, reason="needs two cores")
def test_side_by_side_each_has_a_core_and_a_failure_ends_the_others(tmp_path):
    configs = {"failing": NOTE + WAIT, "other": NOTE + "time.sleep(600)", "third": "never read"}
    for name, text in configs.items():
        (tmp_path / f"{name}.py").write_text(text.replace("NAME", name))
    runs = [Run(str(tmp_path / f"{name}.py"), [], tmp_path / name) for name in configs]
    for run in runs:
        claim(run)
    with pytest.raises(RuntimeError, match="failing/stdout.txt says why"):
        train(runs, jobs=2)
    assert "of no use" in (tmp_path / "failing/stdout.txt").read_text()
    assert not (tmp_path / "third/stdout.txt").exists()
    notes = [
        json.loads(Path(tmp_path, f"{name}.json").read_text()) for name in ("failing", "other")
    ]
    assert [note["threads"] for note in notes] == [["1", "1"]] * 2
    if hasattr(os, "sched_getaffinity"):
        assert [note["cores"] for note in notes] == [[core] for core in usable_cores()[:2]]
    for note in notes:
        with pytest.raises(ProcessLookupError):
            os.kill(note["pid"], 0)
    # What did not come to its first checkpoint can be corrected.
    claim(runs[0]._replace(overrides=["train.max_iter=2"]))
