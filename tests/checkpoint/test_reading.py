import zipfile

import pytest
import torch

from dset_d2.checkpoint import read_state_dict


@pytest.mark.parametrize("wrap", ["ema", "model", "bare", "ddp"])
def test_layouts(tmp_path, wrap):
    state = {"a.weight": torch.rand(2, 3), "a.bias": torch.rand(2)}
    wrong = {k: torch.zeros_like(v) for k, v in state.items()}
    checkpoint = {
        "ema": {"model": wrong, "ema": {"module": state, "updates": 5}, "date": "today"},
        "model": {"model": state, "optimizer": {"state": {}}},
        "bare": state,
        "ddp": {f"module.{k}": v for k, v in state.items()},
    }[wrap]
    torch.save(checkpoint, tmp_path / "weights.pth")
    torch.testing.assert_close(read_state_dict(tmp_path / "weights.pth"), state, rtol=0, atol=0)


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth: no such checkpoint; it is elsewhere"):
        read_state_dict(tmp_path / "absent.pth", hint="it is elsewhere")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="text.pth: not a checkpoint that is safe to read"):
        read_state_dict(tmp_path / "text.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.pth: holds no state dict"):
        read_state_dict(tmp_path / "odd.pth")


def test_what_was_meant_is_named(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "model_final.pth")
    with pytest.raises(FileNotFoundError, match="close to it: model_final.pth"):
        read_state_dict(tmp_path / "model_finl.pth")
    with pytest.raises(ValueError, match="a folder, not a checkpoint; did you mean .*model_final"):
        read_state_dict(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "model_best.pth")
    with pytest.raises(ValueError, match="a folder, not a checkpoint; did you mean .*model_best"):
        read_state_dict(tmp_path)
    (tmp_path / "page.pth").write_text("\n<!DOCTYPE html><html></html>")
    with pytest.raises(ValueError, match="page.pth: a web page, not a checkpoint"):
        read_state_dict(tmp_path / "page.pth")


def test_pickled_code_does_not_run(tmp_path):
    """A checkpoint that would run a command when unpickled is refused."""

    class Payload:
        def __reduce__(self):
            return (zipfile.ZipFile, (str(tmp_path / "ran.zip"), "w"))

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth: not a checkpoint that is safe"):
        read_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "ran.zip").exists()
