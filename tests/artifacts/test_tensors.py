"""A safetensors file on the disk, and its digest without reading it."""

from __future__ import annotations

import errno
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from genrec_dist.artifacts import tensors as module
from genrec_dist.artifacts.files import sha256_file
from genrec_dist.artifacts.tensors import save_tensors

MIXED = {
    "b": torch.arange(7, dtype=torch.uint8),
    "a": torch.randn(3, 5),
    "scalar": torch.tensor(3.0),
    "half": torch.randn(5).bfloat16(),
    "empty": torch.zeros(0, 4),
    "turned": torch.randn(4, 3, dtype=torch.float64).T,
    "flag": torch.tensor([True, False, True]),
    "rows": torch.arange(2, dtype=torch.int64),
}


def test_the_digest_is_that_of_the_file(tmp_path):
    file = tmp_path / "x.safetensors"
    entry = save_tensors(MIXED, file)
    assert entry == {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    stored = load_file(file)
    assert stored.keys() == MIXED.keys()
    assert all(stored[name].equal(value) and stored[name].dtype == value.dtype for name, value in MIXED.items())


def test_a_tensor_longer_than_a_piece_and_no_tensor_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 100)
    for number, tensors in enumerate(({"a": torch.randn(77)}, {})):
        file = tmp_path / f"{number}.safetensors"
        assert save_tensors(tensors, file)["sha256"] == sha256_file(file)


def test_others_may_read_the_file_as_any_other(tmp_path):
    (tmp_path / "plain").touch()
    save_tensors({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "x.safetensors")]
    assert modes[0] == modes[1]


def test_the_operating_systems_error_comes_through_and_nothing_is_left(tmp_path, monkeypatch):
    def full(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError) as caught:
        save_tensors({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        save_tensors({"a": torch.ones(1)}, tmp_path / "none" / "x.safetensors")
