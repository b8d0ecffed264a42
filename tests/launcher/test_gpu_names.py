"""GPUs that this process may use, and what CUDA_VISIBLE_DEVICES calls them; nvidia-smi is a script."""

from __future__ import annotations

import os

import pytest

from launcher.sweep_machine import GIB, this_machine

TWO = "0, GPU-aa, 81920\n1, GPU-bb, 40960"


@pytest.mark.parametrize(
    ("listed", "visible", "names", "sizes"),
    [
        (TWO, None, ["0", "1"], (80, 40)),
        (TWO, "1", ["1"], (40,)),
        (TWO, "GPU-bb, 0", ["GPU-bb", "0"], (40, 80)),
        (TWO, "0,7,1", ["0"], (80,)),  # CUDA stops at the first that is none
        (TWO, "", [], ()),
        (TWO, "-1", [], ()),
        ("0, GPU-cc, [N/A]", None, [], ()),
        ("exit 1", None, [], ()),
    ],
)
def test_visible_gpus(tmp_path, monkeypatch, listed, visible, names, sizes):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + (listed if listed.startswith("exit") else f"cat <<'END'\n{listed}\nEND"))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list(this_machine("auto").gpu_names) == names
    assert this_machine("auto").gpus == tuple(size * GIB for size in sizes)
    assert this_machine("cpu").gpus == ()


def test_without_the_tool_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert this_machine("auto").gpu_names == ()
