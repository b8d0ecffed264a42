"""A run folder's copy in a bucket: whole after every pull, whatever happened to the pulls and pushes before."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from genrec_dist.artifacts.bucket import Bucket
from genrec_dist.artifacts.files import append_jsonl
from genrec_dist.run_mirror import EVENTS, RunMirror
from genrec_dist.testing.faults import InjectedFault


@pytest.fixture
def mirror(s3, tmp_path):
    """The copy as a machine sees it, by the machine's name."""
    return lambda name: RunMirror(f"{s3}/runs/one", tmp_path / name)


def write(mirror: RunMirror, **files: str) -> None:
    mirror.folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (mirror.folder / f"{name}.json").write_text(text)
    append_jsonl(mirror.folder / EVENTS, {"time": time.time(), "event": "x"})


def names(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(".")}


def test_what_is_pushed_is_pulled_and_removed(mirror):
    writer, reader = mirror("a"), mirror("b")
    write(writer, config="c", report="r")
    writer.push()
    reader.pull()
    assert names(reader.folder) == names(writer.folder)
    (writer.folder / "report.json").unlink()
    write(writer, config="d")
    writer.push()
    assert "report.json" not in list(writer.bucket.names())
    reader.pull()
    assert names(reader.folder)["config.json"] == "d"


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_pull_that_was_cut_off_is_made_good(mirror, monkeypatch, after):
    writer, reader = mirror("a"), mirror("b")
    write(writer, config="c", metrics="m", report="r")
    writer.push()
    download, done = Bucket.download, []

    def dies(self, name, file):
        if len(done) == after:
            raise InjectedFault
        done.append(name)
        return download(self, name, file)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "download", dies)
        with pytest.raises(InjectedFault):
            reader.pull()
    reader = mirror("b")
    reader.pull()
    assert names(reader.folder) == names(writer.folder)
    write(reader, more="x")
    reader.push()  # a run goes on there
    assert {"config.json", "metrics.json", "report.json", "more.json"} <= set(writer.bucket.names())


def test_a_reader_in_the_middle_of_a_push_gets_the_rest_the_next_time(mirror, monkeypatch):
    writer, reader = mirror("a"), mirror("b")
    write(writer, config="c", report="old")
    writer.push()
    write(writer, report="new")
    put = Bucket.write

    def with_a_reader(self, name, data, **condition):
        if name == "report.json":
            reader.pull()  # the events are there already, the report is not
        return put(self, name, data, **condition)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", with_a_reader)
        writer.push()
    assert names(reader.folder)["report.json"] == "old"
    reader.pull()
    assert names(reader.folder) == names(writer.folder)


def test_a_folder_that_went_further_is_not_overwritten(mirror):
    writer, other = mirror("a"), mirror("b")
    write(writer, config="c", report="mine")
    writer.push()
    other.pull()
    write(other, report="theirs")
    other.push()
    write(writer, report="further")  # killed before its push
    writer = mirror("a")
    writer.pull()
    assert names(writer.folder)["report.json"] == "further"
    writer.push()
    other.pull()
    assert names(other.folder)["report.json"] == "further"


def test_logs_that_grew_are_kept_where_no_event_is_newer(mirror):
    """A killed run's folder, and somebody who wrote its report elsewhere meanwhile."""
    writer, other = mirror("a"), mirror("b")
    write(writer, config="c", log="one line")
    writer.push()
    (writer.folder / "log.json").write_text("three lines")
    other.pull()
    (other.folder / "report.json").write_text("r")
    other.push()
    writer = mirror("a")
    writer.pull()
    assert names(writer.folder)["log.json"] == "three lines"
    assert names(writer.folder)["report.json"] == "r"
    writer.push()
    other.pull()
    assert names(other.folder)["log.json"] == "three lines"


def test_a_push_that_was_cut_off_before_its_word_is_announced_by_the_next(mirror, monkeypatch):
    writer, reader = mirror("a"), mirror("b")
    write(writer, config="c")
    writer.push()
    reader.pull()
    put = Bucket.write

    def dies(self, name, data, **condition):
        if name == ".pushed":
            raise InjectedFault
        return put(self, name, data, **condition)

    (writer.folder / "report.json").write_text("r")
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", dies)
        with pytest.raises(InjectedFault):
            writer.push()
    writer.push()
    reader.pull()
    assert names(reader.folder)["report.json"] == "r"


def test_a_run_whose_first_push_was_cut_off_is_brought_as_far_as_it_came(mirror):
    writer, reader = mirror("a"), mirror("b")
    write(writer, config="c")
    writer.push()
    writer.bucket.remove([".pushed"])
    reader.pull()
    assert names(reader.folder) == names(writer.folder)


def test_a_push_of_nothing_new_changes_nothing(mirror):
    writer = mirror("a")
    write(writer, config="c")
    writer.push()
    word = writer.bucket.read(".pushed")
    writer.push()
    assert writer.bucket.read(".pushed") == word
