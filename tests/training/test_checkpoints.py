"""Checkpoints: the newest valid one wins, broken ones are named, old ones go."""

from __future__ import annotations

import pytest
import torch

from genrec_dist.testing.faults import flip_byte, truncate
from genrec_dist.training.checkpoints import MANIFEST, Checkpoints


@pytest.fixture
def three(tmp_path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (5, 10, 100):
        state = {"model/w": torch.full((4,), float(step)), "step": torch.tensor(float(step))}
        checkpoints.save(step, {"step": step, "best": 0.5}, state, {"w": torch.ones(2)})
    return checkpoints


def loaded_step(checkpoints: Checkpoints) -> int:
    loop, state, _ = checkpoints.latest()
    assert float(state["step"]) == loop["step"] == float(state["model/w"][0])
    return loop["step"]


def test_roundtrip(three):
    loop, state, best = three.latest()
    assert loop == {"step": 100, "best": 0.5}
    assert state["model/w"].tolist() == [100.0] * 4
    assert best["w"].tolist() == [1.0, 1.0]
    assert three.skipped == []


def test_nothing_there(tmp_path):
    assert Checkpoints(tmp_path / "none").latest() is None


def test_without_a_best_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"step": 3}, {"w": torch.ones(1)}, None)
    assert checkpoints.latest()[2] is None


@pytest.mark.parametrize("name", ["state.safetensors", "best.safetensors"])
@pytest.mark.parametrize(("fault", "said"), [(truncate, "truncated"), (flip_byte, "SHA-256")])
def test_a_broken_file_is_named_and_the_one_before_is_used(three, name, fault, said):
    fault(three.folder / "step-100" / name)
    assert loaded_step(three) == 10
    assert len(three.skipped) == 1
    assert three.skipped[0].startswith(f"step-100: {name}")
    assert said in three.skipped[0]


def test_a_missing_file_or_manifest_is_named(three):
    (three.folder / "step-100" / "state.safetensors").unlink()
    (three.folder / "step-10" / MANIFEST).unlink()
    assert loaded_step(three) == 5
    assert [text.split(":")[0] for text in three.skipped] == ["step-100", "step-10"]


def test_a_truncated_manifest_is_named(three):
    truncate(three.folder / "step-100" / MANIFEST)
    assert loaded_step(three) == 10
    assert "manifest" in three.skipped[0]


@pytest.mark.parametrize("text", ["[]", "null", '{"files": 3}'])
def test_a_manifest_of_another_shape_is_named(three, text):
    (three.folder / "step-100" / MANIFEST).write_text(text)
    assert loaded_step(three) == 10
    assert "manifest" in three.skipped[0]


def test_all_broken_means_none(three):
    for step in (5, 10, 100):
        truncate(three.folder / f"step-{step}" / "state.safetensors")
    assert three.latest() is None
    assert len(three.skipped) == 3


def test_an_unfinished_write_does_not_count(three):
    """A kill between the files and the rename leaves writing-<step>; the next save of that step replaces it."""
    (three.folder / "step-100").rename(three.folder / "writing-100")
    assert loaded_step(three) == 10
    three.save(100, {"step": 100}, {"model/w": torch.full((4,), 100.0), "step": torch.tensor(100.0)}, None)
    assert loaded_step(three) == 100
    assert not (three.folder / "writing-100").exists()


def test_saving_again_replaces(three):
    three.save(100, {"step": 100, "best": 0.9}, {"step": torch.tensor(100.0)}, None)
    assert three.latest()[0]["best"] == 0.9


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 11, 100):
        checkpoints.save(step, {"step": step}, {"w": torch.ones(1)}, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100", "step-11"]
