"""Artifacts in an S3 bucket behind a cache, against a real server on loopback: kills, two writers, damage, resuming."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from genrec_dist.artifacts import bucket
from genrec_dist.artifacts.bucket import Bucket
from genrec_dist.artifacts.cached_store import CachedStore, open_store
from genrec_dist.artifacts.files import append_jsonl
from genrec_dist.artifacts.places import is_inside, is_url, local_folder, parse_url, place_of
from genrec_dist.artifacts.snapshots import SNAPSHOT
from genrec_dist.artifacts.store import MANIFEST, ArtifactStore
from genrec_dist.errors import ArtifactError, ClusterError, ConfigError
from genrec_dist.testing.faults import InjectedFault

STAGE, KEY = "fusion", "0123456789abcdef"


@pytest.fixture
def machine(s3, tmp_path, monkeypatch):
    """Makes the store of a machine, by its name: each has a cache of its own."""

    def make(name: str) -> CachedStore:
        monkeypatch.setenv("GENREC_CACHE", str(tmp_path / name))
        store = open_store(f"{s3}/team/store")
        assert isinstance(store, CachedStore)
        store.heard = []
        store.tell = lambda kind, **fields: store.heard.append(kind)
        return store

    return make


def build(store: CachedStore, text: str = "weights") -> Path:
    with store.building(STAGE, KEY) as out:
        (out / "model.bin").write_text(text)
        (out / "more").mkdir(exist_ok=True)
        (out / "more" / "table.bin").write_text("table of " + text)
        return store.finish(STAGE, KEY, {"version": 1})


def objects(store: CachedStore) -> list[str]:
    return sorted(store.bucket.names())


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.bin")}


def test_what_one_machine_builds_another_fetches(machine):
    built = content(build(machine("a")))
    other = machine("b")
    assert not ArtifactStore(other.root).exists(STAGE, KEY)
    assert other.exists(STAGE, KEY)
    assert content(other.open(STAGE, KEY)) == built == {"model.bin": "weights", "more/table.bin": "table of weights"}
    assert not other.exists("generator", KEY)
    with pytest.raises(ArtifactError, match="no such artifact"):
        other.open("generator", KEY)


def test_a_kill_between_uploads_leaves_nothing_that_exists(machine, monkeypatch):
    first = machine("a")
    upload = Bucket.upload

    def dies(self, file, name):
        if file.name == "table.bin":
            raise InjectedFault
        upload(self, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "upload", dies)
        with pytest.raises(InjectedFault):
            build(first)
    assert any(name.endswith(".bin") for name in objects(first))
    other = machine("b")
    assert not other.exists(STAGE, KEY)
    build(other, "others")
    left = [name for name in objects(other) if "quarantine" not in name]
    assert len(left) == 3, left  # the manifest and two files: what the killed upload left is gone
    third = machine("c")
    assert content(third.open(STAGE, KEY))["model.bin"] == "others"


def test_a_machine_that_was_killed_before_its_upload_uploads_the_next_time(machine):
    store = machine("a")
    with ArtifactStore(store.root).building(STAGE, KEY) as out:
        (out / "model.bin").write_text("weights")
        ArtifactStore(store.root).finish(STAGE, KEY, {})
    assert objects(store) == []
    store.keep(STAGE, KEY)
    assert content(machine("b").open(STAGE, KEY)) == {"model.bin": "weights"}


def test_of_two_writers_one_counts_and_nothing_is_mixed(machine):
    stores = [machine(name) for name in "ab"]
    together = threading.Barrier(2)
    folders: dict[str, Path] = {}

    def write(store: CachedStore, text: str) -> None:
        with store.building(STAGE, KEY) as out:
            (out / "model.bin").write_text(text)
            (out / "table.bin").write_text(text)
            together.wait(20)
            folders[text] = store.finish(STAGE, KEY, {})

    threads = [threading.Thread(target=write, args=(s, t)) for s, t in zip(stores, ("one", "two"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = content(machine("c").open(STAGE, KEY))
    assert found in ({"model.bin": "one", "table.bin": "one"}, {"model.bin": "two", "table.bin": "two"})
    assert [content(folder) for folder in folders.values()] == [found, found]  # the loser took over the winner's
    assert sum("artifact_finished_elsewhere" in store.heard for store in stores) == 1
    assert len([name for name in objects(stores[0]) if name.startswith(f"{STAGE}/")]) == 3


def test_a_later_writer_takes_over_what_the_bucket_has(machine):
    first, second = machine("a"), machine("b")
    with second.building(STAGE, KEY) as out:
        (out / "model.bin").write_text("later")
        built = content(build(first, "earlier"))
        assert content(second.finish(STAGE, KEY, {"version": 1})) == built
    assert second.heard == ["artifact_finished_elsewhere"]
    assert content(machine("c").open(STAGE, KEY)) == built


def test_a_stale_cache_takes_over_what_was_built_anew(machine):
    build(machine("a"), "old")
    other = machine("b")
    other.bucket.remove(list(other.bucket.names()))
    build(other, "new")
    store = machine("a")
    store.open(STAGE, KEY)
    store.keep(STAGE, KEY)
    assert content(store.open(STAGE, KEY))["model.bin"] == "new"
    assert store.heard == ["artifact_finished_elsewhere"]


def test_a_writer_publishes_its_own_where_the_others_went_away(machine, monkeypatch):
    first, second = machine("a"), machine("b")
    with second.building(STAGE, KEY) as out:
        (out / "model.bin").write_text("mine")
        build(first, "others")
        read, seen = Bucket.read, []

        def vanishes(self, name):
            found = read(self, name)
            if name.endswith(f"{KEY}/{MANIFEST}") and not seen:
                seen.append(name)
                self.remove(list(self.names(f"{STAGE}/{KEY}/")))  # a third machine found it corrupt
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "read", vanishes)
            second.finish(STAGE, KEY, {"version": 1})
    assert seen
    assert content(machine("c").open(STAGE, KEY)) == {"model.bin": "mine"}


def test_a_copy_that_another_process_brought_meanwhile_stays(machine):
    build(machine("a"), "new")
    store = machine("b")
    store.open(STAGE, KEY)
    before = (store.path(STAGE, KEY) / "model.bin").stat().st_ino
    assert store.fetch(STAGE, KEY, replace=True)
    assert (store.path(STAGE, KEY) / "model.bin").stat().st_ino == before


def test_a_writer_publishes_its_own_where_the_others_is_corrupt(machine):
    first, second = machine("a"), machine("b")
    with second.building(STAGE, KEY) as out:
        (out / "model.bin").write_text("sound")
        build(first, "damaged")
        first.bucket.remove([next(name for name in objects(first) if name.endswith("model.bin"))])
        assert content(second.finish(STAGE, KEY, {"version": 1})) == {"model.bin": "sound"}
    assert second.heard == ["artifact_finished_elsewhere", "stored_artifact_corrupt"]
    assert content(machine("c").open(STAGE, KEY)) == {"model.bin": "sound"}


def test_an_answer_that_is_lost_does_not_make_a_writer_lose(machine, monkeypatch):
    """boto3 tries again where a connection breaks: the second try finds what the first one wrote."""
    store = machine("a")
    put = store.bucket._client.put_object

    def twice(**request):
        if "IfNoneMatch" in request or "IfMatch" in request:
            put(**request)
        return put(**request)

    with monkeypatch.context() as patch:
        patch.setattr(store.bucket._client, "put_object", twice)
        with store.building(STAGE, KEY) as out:
            write_step(out, 1)
            store.snapshot()
            assert store.snapshots.exists(STAGE, KEY)
            (out / "model.bin").write_text("weights")
            store.finish(STAGE, KEY, {})
    assert store.heard == []
    assert content(machine("b").open(STAGE, KEY)) == {"model.bin": "weights"}


def test_a_conflict_is_tried_again(machine, monkeypatch):
    store = machine("a")
    put, refused = store.bucket._client.put_object, []

    def conflicts(**request):
        if "IfNoneMatch" in request and len(refused) < 3:
            refused.append(request["Key"])
            raise ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")
        return put(**request)

    with monkeypatch.context() as patch:
        patch.setattr(store.bucket._client, "put_object", conflicts)
        patch.setattr(bucket, "CONFLICT_SECONDS", 0.0)
        assert store.bucket.write("name", b"data", new=True) is not None
        assert len(refused) == 3
        assert store.bucket.read("name")[0] == b"data"
        patch.setattr(bucket, "CONFLICT_TRIES", 2)
        refused.clear()
        with pytest.raises(ClusterError, match="ConditionalRequestConflict"):
            store.bucket.write("other", b"data", new=True)


def test_what_cannot_be_removed_is_an_error(machine, monkeypatch):
    store = machine("a")
    refused = {"Errors": [{"Key": "x", "Code": "NoSuchKey"}, {"Key": "team/store/name", "Code": "AccessDenied"}]}
    monkeypatch.setattr(store.bucket._client, "delete_objects", lambda **request: refused)
    with pytest.raises(ClusterError, match=r"(?s)name.*not removed: AccessDenied"):
        store.bucket.remove(["name"])


@pytest.mark.parametrize("damage", ["flipped", "missing", "manifest", "escape"])
def test_a_corrupt_artifact_is_named_put_aside_and_rebuilt(machine, damage, tmp_path):
    first = machine("a")
    build(first)
    manifest, name = f"{STAGE}/{KEY}/{MANIFEST}", next(n for n in objects(first) if n.endswith("model.bin"))
    if damage == "flipped":
        first.bucket.write(name, b"wEights")
    elif damage == "missing":
        first.bucket.remove([name])
    elif damage == "manifest":
        first.bucket.write(manifest, b"{")
    else:
        record = json.loads(first.bucket.read(manifest)[0])
        record["files"]["../../escaped"] = {"bytes": 1, "sha256": "0" * 64}
        first.bucket.write(manifest, json.dumps(record).encode())
    other = machine("b")
    named = {"flipped": "model.bin", "missing": "model.bin", "manifest": MANIFEST, "escape": "escaped"}[damage]
    with pytest.raises(ArtifactError, match=f"(?s)corrupt.*{named}.*quarantine"):
        other.open(STAGE, KEY)
    assert not other.exists(STAGE, KEY)
    assert not list(tmp_path.rglob("escaped"))
    aside = [n for n in objects(other) if n.startswith(f"quarantine/{STAGE}-{KEY}-")]
    assert any(n.endswith(MANIFEST) for n in aside)
    assert not [n for n in objects(other) if n.startswith(f"{STAGE}/{KEY}/")]
    build(other, "again")
    assert content(machine("c").open(STAGE, KEY))["model.bin"] == "again"


def test_a_damaged_cache_is_fetched_again(machine):
    build(machine("a"))
    store = machine("a")
    (store.path(STAGE, KEY) / "model.bin").write_text("wEights")
    assert content(store.open(STAGE, KEY))["model.bin"] == "weights"
    assert store.heard == ["cached_artifact_corrupt"]


def write_step(out: Path, step: int) -> None:
    folder = out / "scratch" / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_text(f"state {step}")
    (folder / "checkpoint.json").write_text(f"{step}")
    append_jsonl(out / "curves.jsonl", {"step": step})
    for name in ("scratch/progress.json", f"scratch/checkpoints/writing-{step + 1}/state.safetensors", "a.partial"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("passing")
    past = os.stat(out).st_mtime - 5
    for file in out.rglob("*"):
        os.utime(file, (past, past))


def names_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_an_unfinished_build_goes_on_on_another_machine(machine):
    first = machine("a")
    with pytest.raises(InjectedFault), first.building(STAGE, KEY) as out:  # noqa: PT012
        write_step(out, 1)
        first.snapshot()
        write_step(out, 2)
        first.snapshot()
        shutil.rmtree(out / "scratch" / "checkpoints" / "step-1")
        raise InjectedFault
    other = machine("b")
    assert other.has_unfinished(STAGE, KEY)
    with other.building(STAGE, KEY) as out:
        step = "scratch/checkpoints/step-2"
        assert names_in(out) == {f"{step}/state.safetensors", f"{step}/checkpoint.json", "curves.jsonl"}
        assert (out / step / "state.safetensors").read_text() == "state 2"
        assert (out / "curves.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
        other.finish(STAGE, KEY, {})
    assert not [name for name in objects(other) if ".building" in name]
    assert not other.has_unfinished(STAGE, KEY)


def test_a_snapshot_lasts_until_its_artifact_is_in_the_bucket(machine, monkeypatch):
    first = machine("a")
    upload = Bucket.upload

    def dies(self, file, name):
        if file.name == "model.bin":
            first.snapshot()  # its time has come while the artifact travels
            raise InjectedFault
        upload(self, file, name)

    with monkeypatch.context() as patch, first.building(STAGE, KEY) as out:
        write_step(out, 1)
        first.snapshot()
        (out / "model.bin").write_text("weights")
        patch.setattr(Bucket, "upload", dies)
        with pytest.raises(InjectedFault):
            first.finish(STAGE, KEY, {})
    other = machine("b")
    assert not other.exists(STAGE, KEY)
    with other.building(STAGE, KEY) as out:
        assert (out / "scratch" / "checkpoints" / "step-1" / "state.safetensors").read_text() == "state 1"
    machine("a").keep(STAGE, KEY)  # that machine comes back
    assert content(machine("c").open(STAGE, KEY)) == {"model.bin": "weights"}
    assert not machine("c").has_unfinished(STAGE, KEY)


def test_a_folder_that_is_renamed_spoils_no_snapshot(machine, monkeypatch):
    store = machine("a")
    with store.building(STAGE, KEY) as out:
        write_step(out, 1)
        store.snapshot()
        out.rename(out.with_name("elsewhere"))
        store.snapshot()
        assert store.snapshots.exists(STAGE, KEY)
        out.with_name("elsewhere").rename(out)


def test_a_kill_between_uploads_of_a_snapshot_leaves_the_one_before(machine, monkeypatch):
    first = machine("a")
    with first.building(STAGE, KEY) as out:
        write_step(out, 1)
        first.snapshot()
        write_step(out, 2)
        upload = Bucket.upload

        def fails(self, file, name):
            if file.name == "checkpoint.json":
                raise ClusterError("gone")
            upload(self, file, name)

        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "upload", fails)
            first.snapshot()
            first.snapshot = lambda: None  # killed
    assert first.heard == ["snapshot_failed"]
    with machine("b").building(STAGE, KEY) as out:
        assert [p.name for p in (out / "scratch" / "checkpoints").iterdir()] == ["step-1"]


def test_the_machine_that_claimed_a_build_last_counts(machine):
    first, second = machine("a"), machine("b")
    with first.building(STAGE, KEY) as out:
        write_step(out, 1)
        first.snapshot()
        with second.building(STAGE, KEY) as taken:
            write_step(taken, 2)
            second.snapshot()
            write_step(out, 9)
            first.snapshot()  # cut off meanwhile, and does not know yet
            assert first.heard == ["build_claimed_elsewhere"]
            second.snapshot()
    with machine("c").building(STAGE, KEY) as found:
        assert sorted(p.name for p in (found / "scratch" / "checkpoints").iterdir()) == ["step-1", "step-2"]


def test_the_own_folder_is_used_if_nobody_went_further(machine):
    store = machine("a")
    with store.building(STAGE, KEY) as out:
        write_step(out, 1)
        store.snapshot()
        write_step(out, 2)
        (out / "only-here").write_text("newer than the snapshot")
        store.snapshot = lambda: None  # killed
    with machine("a").building(STAGE, KEY) as out:
        assert (out / "only-here").exists()
        write_step(out, 3)
    with machine("b").building(STAGE, KEY) as out:
        write_step(out, 5)
        other = machine("b")
        other.snapshots._builds = {}
    with machine("a").building(STAGE, KEY) as out:  # b claimed it meanwhile: its state counts
        assert not (out / "only-here").exists()


@pytest.mark.parametrize("damage", ["flipped", "missing", "manifest"])
def test_a_corrupt_snapshot_is_named_and_not_used(machine, damage):
    first = machine("a")
    with first.building(STAGE, KEY) as out:
        write_step(out, 1)
        first.snapshot()
    names = [name for name in objects(first) if ".building/" in name]
    data = next(name for name in names if not name.endswith(SNAPSHOT))
    if damage == "flipped":
        first.bucket.write(data, b"x")
    elif damage == "missing":
        first.bucket.remove([data])
    else:
        first.bucket.write(next(name for name in names if name.endswith(SNAPSHOT)), b"[]")
    other = machine("b")
    with other.building(STAGE, KEY) as out:
        assert list(out.iterdir()) == []
        assert other.heard == ["snapshot_corrupt"]
        other.finish(STAGE, KEY, {})


def test_a_file_that_changes_while_it_is_copied_spoils_no_snapshot(machine, monkeypatch):
    store = machine("a")
    with store.building(STAGE, KEY) as out:
        write_step(out, 1)
        upload = Bucket.upload

        def changes(self, file, name):
            upload(self, file, name)
            if file.name == "state.safetensors":
                with open(out / "scratch/checkpoints/step-1/state.safetensors", "a") as handle:
                    handle.write("more")

        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "upload", changes)
            store.snapshot()
        assert not store.snapshots.exists(STAGE, KEY)


def test_places():
    assert is_url("s3://bucket/a/b")
    assert not is_url("store")
    assert not is_url(Path("s3://bucket"))
    folder = local_folder("s3://bucket/a/b/")
    assert folder.parts[-4:] == ("s3", "bucket", "a", "b")
    assert place_of(folder) == "s3://bucket/a/b"
    assert place_of(Path("/somewhere")) == Path("/somewhere")
    assert [is_inside(n) for n in ("a/b", "../a", "/a", "", "a/../../b", 3)] == [
        True,
        False,
        False,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "text",
    ["s3://bucket", "s3://bucket/", "s3://bucket/../x", "s3://b/x", "s3://UPPER/x", "s3://bucket//x", "gs://bucket/x"]
    + ["s3://key:secret@bucket/x", "http://host/x", "s3://bucket/.hidden", "s3://a..b/x", "s3:/bucket/x"],
)
def test_urls_that_are_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse_url(text)
    assert "secret" not in str(caught.value)


def test_a_server_that_does_not_answer_is_a_typed_error(machine, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("botocore.retryhandler.delay_exponential", lambda *a, **k: 0, raising=False)
    with pytest.raises(ClusterError, match="object store") as caught:
        machine("a").open(STAGE, KEY)
    assert "very-secret" not in str(caught.value)
