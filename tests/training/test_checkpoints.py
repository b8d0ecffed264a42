"""Checkpoints: the newest whole one wins, broken and foreign ones are named, bests are shared, old ones go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.testing.faults import flip_byte, truncate
from genrec_dist.training.checkpoint_folder import MANIFEST
from genrec_dist.training.checkpoints import Checkpoints
from genrec_dist.training.worker import Worker

BEST_OF = {5: 5, 10: 10, 100: 10}


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"model/w": torch.full((4,), float(step)), "step": torch.tensor(float(step))}


def save_step(checkpoints: Checkpoints, step: int, best_step: int | None = None, **loop) -> None:
    best = None if best_step is None else {"w": torch.full((2,), float(best_step))}
    checkpoints.save(step, {"step": step} | loop, state_of(step), best, best_step or 0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def three(tmp_path) -> Checkpoints:
    """Steps 5, 10 and 100; the last two belong to the best of step 10."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3, background=False)
    for step, best_step in BEST_OF.items():
        save_step(checkpoints, step, best_step, best=0.5)
    return checkpoints


def again(checkpoints: Checkpoints, **settings) -> Checkpoints:
    """As another process finds them."""
    return Checkpoints(checkpoints.folder, keep=3, background=False, **settings)


def loaded_step(checkpoints: Checkpoints) -> int:
    loop, state, best = checkpoints.latest(Worker())
    assert float(state["step"]) == loop["step"] == float(state["model/w"][0])
    assert best["w"].tolist() == [BEST_OF[loop["step"]]] * 2
    return loop["step"]


def test_roundtrip(three):
    loop, state, best = three.latest(Worker())
    assert loop == {"step": 100, "best": 0.5}
    assert state["model/w"].tolist() == [100.0] * 4
    assert best["w"].tolist() == [10.0, 10.0]
    assert three.skipped == []


def test_nothing_there(tmp_path):
    assert Checkpoints(tmp_path / "none").latest(Worker()) is None


def test_without_a_best_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path, background=False)
    save_step(checkpoints, 3)
    assert checkpoints.latest(Worker())[2] is None
    assert names(tmp_path) == ["step-3"]


@pytest.mark.parametrize(("fault", "said"), [(truncate, "truncated"), (flip_byte, "SHA-256")])
def test_a_broken_file_is_named_and_the_one_before_is_used(three, fault, said):
    fault(three.folder / "step-100" / "state.safetensors")
    assert loaded_step(three) == 10
    assert len(three.skipped) == 1
    assert three.skipped[0].startswith("step-100: state.safetensors")
    assert said in three.skipped[0]


@pytest.mark.parametrize(("fault", "said"), [(truncate, "truncated"), (flip_byte, "SHA-256"), (Path.unlink, "missing")])
def test_a_broken_best_breaks_all_checkpoints_that_belong_to_it(three, fault, said):
    fault(three.folder / "best-10" / "model.safetensors")
    assert loaded_step(three) == 5
    assert [text.split(" ")[0:2] for text in three.skipped] == [
        ["step-100:", "best-10/model.safetensors"],
        ["step-10:", "best-10/model.safetensors"],
    ]
    assert all(said in text for text in three.skipped)


@pytest.mark.parametrize("fault", [truncate, Path.unlink])
def test_a_best_without_a_manifest_breaks_them_too(three, fault):
    fault(three.folder / "best-10" / MANIFEST)
    assert loaded_step(three) == 5
    assert "best-10 has no readable manifest" in three.skipped[0]


def test_another_best_of_the_same_step_is_not_taken_for_it(three):
    """Whole in itself, but not what the checkpoint was saved with."""
    other = Checkpoints(three.folder.parent / "other", background=False)
    other.save(10, {}, state_of(10), {"w": torch.full((2,), 7.0)}, 10)
    for name in ("model.safetensors", MANIFEST):
        (other.folder / "best-10" / name).replace(three.folder / "best-10" / name)
    assert loaded_step(three) == 5
    assert "best-10 is not the one" in three.skipped[0]


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
    assert three.latest(Worker()) is None
    assert len(three.skipped) == 3


def test_a_checkpoint_of_other_settings_is_named_and_not_used(three):
    assert three.latest(Worker())[0]["step"] == 100
    other = again(three, fingerprint="abc")
    assert other.latest(Worker()) is None
    assert other.skipped[0] == "step-100: of other settings: fingerprint '', not 'abc'"
    save_step(other, 7, 7)
    assert other.latest(Worker())[0]["step"] == 7
    assert again(three, fingerprint="abc").latest(Worker())[0]["step"] == 7


def test_an_unfinished_write_does_not_count(three):
    """A kill between the files and the rename leaves writing-<step>; the next save removes it."""
    (three.folder / "step-100").rename(three.folder / "writing-100")
    assert loaded_step(three) == 10
    save_step(three, 100, 10)
    assert loaded_step(three) == 100
    assert not (three.folder / "writing-100").exists()


def test_a_best_whose_checkpoint_was_never_finished_does_not_count(three):
    """A kill between the two renames: the best is there, no checkpoint names it, and the next save removes it."""
    save_step(three, 101, 101)
    (three.folder / "step-101").rename(three.folder / "writing-101")
    later = again(three)
    assert loaded_step(later) == 100
    save_step(later, 102, 10)
    assert names(three.folder) == ["best-10", "step-10", "step-100", "step-102"]


def test_saving_again_replaces(three):
    save_step(three, 100, best=0.9)
    assert three.latest(Worker())[0]["best"] == 0.9


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, background=False)
    for step in (9, 10, 11, 100):
        save_step(checkpoints, step)
    assert names(tmp_path) == ["step-100", "step-11"]


def test_a_best_is_written_once_and_kept_as_long_as_a_kept_checkpoint_names_it(tmp_path):
    checkpoints, files = Checkpoints(tmp_path, keep=2, background=False), set()
    wanted = {
        (1, None): ["step-1"],
        (2, 2): ["best-2", "step-1", "step-2"],
        (3, 2): ["best-2", "step-2", "step-3"],
        (4, 4): ["best-2", "best-4", "step-3", "step-4"],
        (5, 5): ["best-4", "best-5", "step-4", "step-5"],
        (6, 5): ["best-5", "step-5", "step-6"],
        (7, 5): ["best-5", "step-6", "step-7"],
    }
    for (step, best_step), there in wanted.items():
        save_step(checkpoints, step, best_step)
        assert names(tmp_path) == there
        if best_step == 5:
            files.add((tmp_path / "best-5" / "model.safetensors").stat().st_ino)
    assert len(files) == 1
    assert names(tmp_path / "step-7") == [MANIFEST, "state.safetensors"]


def test_a_resumed_run_does_not_write_the_best_again(three):
    later = again(three)
    assert loaded_step(later) == 100
    before = (three.folder / "best-10" / "model.safetensors").stat().st_ino
    save_step(later, 101, 10)
    assert (three.folder / "best-10" / "model.safetensors").stat().st_ino == before
    assert again(three).latest(Worker())[2]["w"].tolist() == [10.0, 10.0]


def test_after_a_fall_back_a_best_of_the_same_step_is_written_anew(three):
    """Trained again from step 5, step 10 may have other parameters: they must not be taken for the old ones."""
    truncate(three.folder / "step-10" / "state.safetensors")
    truncate(three.folder / "step-100" / "state.safetensors")
    later = again(three)
    assert loaded_step(later) == 5
    later.save(10, {"step": 10}, state_of(10), {"w": torch.full((2,), -1.0)}, 10)
    assert names(three.folder) == ["best-10", "best-5", "step-10", "step-5"]
    assert again(three).latest(Worker())[2]["w"].tolist() == [-1.0, -1.0]


def test_broken_ones_neither_count_nor_go_before_a_newer_one_is_complete(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, background=False)
    for step in (1, 2):
        save_step(checkpoints, step)
    truncate(tmp_path / "step-2" / "state.safetensors")
    later = Checkpoints(tmp_path, keep=2, background=False)
    assert later.latest(Worker())[0]["step"] == 1
    assert names(tmp_path) == ["step-1", "step-2"]
    save_step(later, 3)
    assert names(tmp_path) == ["step-1", "step-3"]


def test_the_manifest_says_what_belongs_together(three):
    record = read_json(three.folder / "step-100" / MANIFEST)
    assert (record["step"], record["fingerprint"], record["best"]["name"]) == (100, "", "best-10")
    assert list(record["files"]) == ["state.safetensors"]
    assert record["files"]["state.safetensors"]["bytes"] == (three.folder / "step-100/state.safetensors").stat().st_size
    write_json(three.folder / "step-100" / MANIFEST, record | {"best": None})  # a best is not looked for by its step
    assert three.latest(Worker())[2] is None
