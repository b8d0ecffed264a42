"""Placements: read like inputs, in no key, built only where they are needed."""

from __future__ import annotations

from pathlib import Path

from genrec_dist.artifacts.store import ArtifactStore
from genrec_dist.config import RuntimeConfig
from genrec_dist.pipeline import Stage, closure, execute
from genrec_dist.runs import RunFolder


def make(parts: int, built: list[str]) -> Stage:
    def write(name: str, reads: tuple[str, ...] = ()):
        def build(context) -> None:
            built.append(name)
            text = "".join((context.inputs[role] / "text").read_text() for role in reads)
            (context.out / "text").write_text(name + text)

        return build

    source = Stage("source", 1, {}, {}, write("source"))
    placement = Stage("parts", 1, {"parts": parts}, {"source": source}, write(f"parts{parts}"))
    reads = ("source", "parts")
    return Stage("work", 1, {}, {"source": source}, write("work", reads), placement={"parts": placement})


def run(tmp_path: Path, stage: Stage) -> dict[str, Path]:
    return execute([stage], ArtifactStore(tmp_path / "store"), RunFolder(tmp_path, "run"), RuntimeConfig())


def test_a_placement_is_read_and_changes_no_key(tmp_path):
    built: list[str] = []
    two, three = make(2, built), make(3, built)
    assert two.key == three.key
    assert [s.name for s in closure([two])] == ["source", "parts", "work"]
    folders = run(tmp_path, two)
    assert (folders["work"] / "text").read_text() == "worksourceparts2"
    again = run(tmp_path, three)
    assert built == ["source", "parts2", "work"]
    assert again["work"] == folders["work"]
    assert "parts" not in again


def test_a_corrupt_artifact_is_built_again_with_the_placement_of_the_day(tmp_path):
    built: list[str] = []
    folders = run(tmp_path, make(2, built))
    (folders["work"] / "text").write_text("spoilt")
    built.clear()
    folders = run(tmp_path, make(3, built))
    assert built == ["parts3", "work"]
    assert (folders["work"] / "text").read_text() == "worksourceparts3"
