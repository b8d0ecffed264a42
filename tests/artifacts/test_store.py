"""Artifact store: keys, manifests, every kind of corruption, quarantine, leftovers of a killed build."""

from __future__ import annotations

import errno
import os
import platform
import threading
from pathlib import Path

import pytest

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.artifacts.store import MANIFEST, ArtifactStore, content_key
from genrec_dist.errors import ArtifactError, ConfigError

KEY = "0123456789abcdef"
CONTENT = {"data.bin": b"0123456789", "sub/more.txt": b"text"}


def build(store: ArtifactStore, content: dict[str, bytes] = CONTENT):
    with store.building("toy", KEY) as out:
        for name, data in content.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(data)
        return store.finish("toy", KEY, {"version": 1})


def test_key_depends_on_everything_that_decides_the_content():
    base = content_key("toy", 1, {"a": 1, "b": {"c": 2}}, {"in": "x"})
    assert base == content_key("toy", 1, {"b": {"c": 2}, "a": 1}, {"in": "x"})
    others = [
        content_key("other", 1, {"a": 1, "b": {"c": 2}}, {"in": "x"}),
        content_key("toy", 2, {"a": 1, "b": {"c": 2}}, {"in": "x"}),
        content_key("toy", 1, {"a": 1, "b": {"c": 3}}, {"in": "x"}),
        content_key("toy", 1, {"a": 1, "b": {"c": 2}}, {"in": "y"}),
        content_key("toy", 1, {"a": 1, "b": {"c": 2}}, {"role": "x"}),
    ]
    assert len({base, *others}) == 6


def test_finished_artifact_opens_in_another_process(tmp_path):
    folder = build(ArtifactStore(tmp_path))
    fresh = ArtifactStore(tmp_path)
    assert fresh.open("toy", KEY) == folder
    manifest = read_json(folder / MANIFEST)
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {"data.bin": 10, "sub/more.txt": 4}
    assert manifest["version"] == 1


def _truncate(folder):
    (folder / "data.bin").write_bytes(b"01234")


def _flip_byte(folder):
    (folder / "data.bin").write_bytes(b"012345678X")


def _remove_file(folder):
    (folder / "sub" / "more.txt").unlink()


def _add_file(folder):
    (folder / "extra").write_bytes(b"")


def _truncate_manifest(folder):
    manifest = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(manifest[: len(manifest) // 2])


def _manifest_without_files(folder):
    write_json(folder / MANIFEST, {"stage": "toy"})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_truncate, "data.bin: 5 bytes, recorded 10"),
        (_flip_byte, "data.bin: SHA-256 differs"),
        (_remove_file, "sub/more.txt: missing"),
        (_add_file, "extra: not in the manifest"),
        (_truncate_manifest, MANIFEST),
        (_manifest_without_files, MANIFEST),
    ],
)
def test_damage_is_named_and_quarantined(tmp_path, damage, named):
    folder = build(ArtifactStore(tmp_path))
    damage(folder)
    store = ArtifactStore(tmp_path)
    with pytest.raises(ArtifactError, match="quarantine") as caught:
        store.open("toy", KEY)
    assert named in str(caught.value)
    assert not store.exists("toy", KEY)
    (kept,) = (tmp_path / "quarantine").iterdir()
    assert kept.name.startswith(f"toy-{KEY}")
    assert build(store) == folder
    assert ArtifactStore(tmp_path).open("toy", KEY) == folder


def test_folder_without_manifest_does_not_exist_and_can_be_built(tmp_path):
    folder = build(ArtifactStore(tmp_path))
    (folder / MANIFEST).unlink()
    store = ArtifactStore(tmp_path)
    assert not store.exists("toy", KEY)
    with pytest.raises(ArtifactError, match="no such artifact"):
        store.open("toy", KEY)
    build(store)
    assert ArtifactStore(tmp_path).open("toy", KEY) == folder


def test_unfinished_build_is_invisible_and_its_work_is_kept(tmp_path):
    store = ArtifactStore(tmp_path)

    def killed():
        with store.building("toy", KEY) as out:
            (out / "half").write_bytes(b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert not store.exists("toy", KEY)
    with store.building("toy", KEY) as out:
        assert (out / "half").read_bytes() == b"1"
    store.discard_building("toy", KEY)
    with store.building("toy", KEY) as out:
        assert list(out.iterdir()) == []


def test_scratch_and_torn_temporaries_do_not_enter_the_artifact(tmp_path):
    store = ArtifactStore(tmp_path)
    with store.building("toy", KEY) as out:
        (out / "scratch").mkdir()
        (out / "scratch" / "checkpoint").write_bytes(b"1")
        (out / ".report.json.123.tmp").write_bytes(b"1")  # write_atomic, killed before its rename
        (out / "0.0123456789abcdef.partial").write_bytes(b"1")  # a Zarr chunk, the same
        (out / "data").write_bytes(b"1")
        folder = store.finish("toy", KEY, {})
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, "data"]


@pytest.mark.parametrize("where", ["checksums", "before the rename", "behind it"])
def test_a_build_that_is_killed_while_it_is_finished_goes_on_from_its_scratch(tmp_path, monkeypatch, where):
    store = ArtifactStore(tmp_path)
    replace, renames = os.replace, []

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    def killed_at(source, target):
        renames.append(Path(target).name)
        if where == "before the rename" and renames[-1] == KEY:
            raise KeyboardInterrupt
        replace(source, target)

    def build_again() -> Path:
        with store.building("toy", KEY) as out:
            (out / "scratch").mkdir(exist_ok=True)
            (out / "scratch" / "checkpoint").write_bytes(b"1")
            (out / "data").write_bytes(b"1")
            return store.finish("toy", KEY, {})

    with monkeypatch.context() as patch:
        if where == "checksums":
            patch.setattr("genrec_dist.artifacts.store.sha256_file", killed)
        elif where == "before the rename":
            patch.setattr("genrec_dist.artifacts.store.os.replace", killed_at)
        else:
            patch.setattr("genrec_dist.artifacts.store.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            build_again()
    if where == "behind it":
        assert store.verify("toy", KEY) == []
    else:
        assert not store.exists("toy", KEY)
    with store.building("toy", KEY) as out:
        kept = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
        assert kept == ([] if where == "behind it" else ["data", "scratch/checkpoint"])
        if where != "behind it":
            folder = store.finish("toy", KEY, {})
            assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, "data"]
    assert sorted(p.name for p in (tmp_path / "toy").iterdir()) == [f".{KEY}.lock", KEY]


def test_two_builders_of_one_artifact_take_turns(tmp_path):
    inside, most = [0], [0]

    def work():
        with ArtifactStore(tmp_path).building("toy", KEY):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threading.Event().wait(0.05)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1


def test_a_reader_that_saw_damage_does_not_set_aside_what_was_rebuilt_meanwhile(tmp_path):
    folder = build(ArtifactStore(tmp_path))
    _flip_byte(folder)
    late, early = ArtifactStore(tmp_path), ArtifactStore(tmp_path)
    found = late.verify("toy", KEY)

    def rebuilt_after_the_look(stage: str, key: str) -> list[str]:
        late.verify = lambda *_: ArtifactStore(tmp_path).verify("toy", KEY)
        with pytest.raises(ArtifactError, match="quarantine"):
            early.open("toy", KEY)
        build(early)
        return found

    late.verify = rebuilt_after_the_look
    assert late.open("toy", KEY) == folder
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


def test_the_lock_is_the_same_one_inside_itself_and_names_its_holder(tmp_path):
    store, waited = ArtifactStore(tmp_path), []
    with store.building("toy", KEY) as out, store.building("toy", KEY) as again:
        assert out == again

        def wait() -> None:
            with ArtifactStore(tmp_path).building("toy", KEY, waited.append):
                pass

        thread = threading.Thread(target=wait)
        thread.start()
        while not waited:
            threading.Event().wait(0.01)
    thread.join()
    assert waited == [f"process {os.getpid()} on {platform.node()}"]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ArtifactError, match="no locks"):
        build(ArtifactStore(tmp_path))


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden"])
def test_names_that_leave_the_store_are_refused(tmp_path, name):
    store = ArtifactStore(tmp_path)
    with pytest.raises(ConfigError):
        store.path(name, KEY)
    with pytest.raises(ConfigError):
        store.path("toy", name)
