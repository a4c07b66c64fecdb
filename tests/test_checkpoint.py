"""Checkpoints: strict, atomic, and clear about what is wrong."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toy import raised

from nmlib import checkpoint
from nmlib.checkpoint import CheckpointError
from nmlib.runtime import RunError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}
METADATA = {"step": 3, "settings": {"width": 7, "name": "ü"}, "history": [{"total": 0.1}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint in a folder that `save` had to make."""
    path = tmp_path / "models" / "a.safetensors"
    checkpoint.save(path, TENSORS, METADATA)
    return path


def test_round_trip_keeps_values_types_and_metadata(path: Path) -> None:
    tensors, metadata = checkpoint.load(path)
    assert metadata == METADATA and tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype for name in tensors
    )


def test_views_and_shared_tensors_are_stored_whole(path: Path) -> None:
    """Safetensors itself refuses tensors that share memory or are not contiguous."""
    weight = torch.randn(3, 5)
    checkpoint.save(path, {"weight": weight, "tied": weight, "turned": weight.T, "row": weight[1]}, {})
    tensors, _ = checkpoint.load(path)
    assert torch.equal(tensors["tied"], weight) and torch.equal(tensors["turned"], weight.T)
    assert torch.equal(tensors["row"], weight[1])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_file(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    text = raised(lambda: checkpoint.load(path), CheckpointError)
    assert text.startswith(f"{path}: damaged or truncated (") and text.endswith("; delete it and run again")


def test_missing_file(tmp_path: Path) -> None:
    text = raised(lambda: checkpoint.load(tmp_path / "none.safetensors"), CheckpointError)
    assert text.startswith(f"{tmp_path / 'none.safetensors'}: no such checkpoint; run the notebook that writes it")


def test_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file(TENSORS, path)
    assert "not written by nmlib" in raised(lambda: checkpoint.load(path), CheckpointError)
    save_file(TENSORS, path, metadata={"format": "pt"})
    assert "not written by nmlib" in raised(lambda: checkpoint.load(path), CheckpointError)
    path.write_text("no tensors at all, but a text of some length")
    assert "damaged or truncated" in raised(lambda: checkpoint.load(path), CheckpointError)


def test_every_key_that_does_not_fit_is_named() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    wrong = {"weight": torch.zeros(3, 2), "gain": torch.zeros(1)}
    text = raised(lambda: checkpoint.load_into(module, wrong, "x.safetensors"), CheckpointError)
    assert text == (
        "x.safetensors: does not fit Linear: missing bias (2,); unexpected gain; "
        "weight has shape (3, 2), expected (2, 3)"
    )
    assert torch.equal(module.weight, before), "nothing is loaded in part"
    many = {f"extra{index}": torch.zeros(1) for index in range(20)} | module.state_dict()
    assert "and 12 more" in raised(lambda: checkpoint.load_into(module, many, "x"), CheckpointError)


def test_what_fits_is_loaded_bit_for_bit() -> None:
    torch.manual_seed(0)
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    checkpoint.load_into(target, source.state_dict(), "x")
    assert torch.equal(target.weight, source.weight) and torch.equal(target.bias, source.bias)


def test_failure_while_writing_leaves_the_old_file_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: object, name: Path, metadata: object) -> None:
        Path(name).write_bytes(b"half")
        raise ValueError("boom")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(ValueError, match="boom"):
        checkpoint.save(path, {"a": torch.zeros(1)}, {})
    monkeypatch.undo()
    assert checkpoint.load(path)[1] == METADATA
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no rest is left behind"


def test_full_disk_is_one_clear_line_and_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, name: Path, metadata: object) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    text = raised(lambda: checkpoint.save(path, TENSORS, {}), RunError)
    assert text == f"{path}: the disk is full; free some space and run again, finished work is kept"
    monkeypatch.undo()
    assert checkpoint.load(path)[1] == METADATA


def test_metadata_is_plain_json_in_the_header(path: Path) -> None:
    """A reader needs nothing of this library: the header says what the weights belong to."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["nmlib"]) == METADATA
