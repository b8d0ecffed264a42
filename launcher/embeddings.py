"""Artifacts and embeddings from the command line: verify, export, import."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from genrec_dist.artifacts.embeddings import ARRAY
from genrec_dist.artifacts.store import MANIFEST, problems_of, write_manifest
from genrec_dist.errors import ArtifactError, ConfigError
from genrec_dist.runs import RunFolder


def artifact_folders(target: str, runs: str | Path) -> list[Path]:
    """What a user names: an artifact's folder, a folder of artifacts (a store, or a part of one), or a run.

    Raises:
        ConfigError: it is none of them.
    """
    folder = Path(target)
    if (folder / MANIFEST).is_file():
        return [folder]
    if folder.is_dir() and not (folder / "config.yaml").is_file():
        found = sorted(p.parent for depth in ("*", "*/*") for p in folder.glob(f"{depth}/{MANIFEST}"))
        found = [p for p in found if "quarantine" not in p.parts and not p.name.endswith(".building")]
        if found:
            return found
        raise ConfigError(
            "no finished artifact here", where=folder, expected=f"a folder with {MANIFEST}, a store, or a run"
        )
    run = RunFolder.existing(runs, target)
    return [run.artifact(title) for title in run.links()]


def verify(target: str, runs: str | Path, console: Console) -> None:
    """Check checksums, and where there are embeddings their rows, records, ids and ledger.

    Raises:
        ConfigError: nothing to verify.
        ArtifactError: something is wrong; every problem has been printed.
    """
    folders = artifact_folders(target, runs)
    bad = []
    for folder in folders:
        problems = problems_of(folder)
        if not problems:
            problems = [f"{p}: {text}" for p in embedding_parts(folder) for text in _content_problems(folder / p)]
        name = f"{folder.parent.name}/{folder.name}"
        console.print(f"{escape(name)}: {'ok' if not problems else f'{len(problems)} problems'}", soft_wrap=True)
        for text in problems:
            console.print(f"  {escape(text)}", soft_wrap=True)
        bad += [name] if problems else []
    if bad:
        raise ArtifactError(
            "artifacts are damaged",
            where=target,
            got=", ".join(bad),
            expected=f"{len(folders)} sound artifacts",
            fix="run the command that built them again: damaged artifacts are put aside and rebuilt",
        )


def embedding_parts(folder: Path) -> list[Path]:
    """Folders inside an artifact that hold an embedding array, relative to it."""
    return sorted(p.parent.relative_to(folder) for p in folder.rglob(ARRAY))


def _content_problems(folder: Path) -> list[str]:
    from genrec_dist.artifacts.reader import EmbeddingStore

    try:
        return EmbeddingStore(folder).verify()
    except ArtifactError as error:
        return [str(error).replace("\n", ";")]


def embeddings_folder(source: str, stage: str, runs: str | Path) -> Path:
    """Folder of the embeddings that a user names: itself, or a stage of a run.

    Raises:
        ConfigError: there are none.
    """
    if (Path(source) / ARRAY).is_dir():
        return Path(source)
    folder = RunFolder.existing(runs, source).artifact(stage)
    if not (folder / ARRAY).is_dir():
        raise ConfigError("this stage has no embeddings", where=folder, got=stage, expected="semantic or fusion")
    return folder


def export(source: str, out: Path, stage: str, runs: str | Path, console: Console) -> None:
    """Write embeddings to a .npy, .parquet or .safetensors file."""
    from genrec_dist.artifacts.exchange import export_embeddings
    from genrec_dist.artifacts.reader import EmbeddingStore

    store = EmbeddingStore(embeddings_folder(source, stage, runs))
    export_embeddings(store, out)
    console.print(
        f"wrote {escape(str(out))}: {store.num_items:,} rows of width {store.dim}, {store.dtype}, "
        f"{len(store.failed):,} without an embedding",
        soft_wrap=True,
    )


@contextmanager
def new_folder(out: Path, stage: str, key: str) -> Iterator[Path]:
    """A folder to fill, which becomes `out`, with checksums, when all went well, and is gone otherwise.

    Raises:
        ConfigError: `out` is there already and is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("output is not an empty folder", where="--out", got=out, fix="name a new folder")
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        write_manifest(building, {"stage": stage, "key": key})
        if out.is_dir():
            out.rmdir()
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def import_file(source: Path, out: Path, dtype: str, console: Console) -> None:
    """Make an embedding artifact of a file.

    Raises:
        ConfigError: `out` is there already and is not empty.
    """
    from genrec_dist.artifacts.exchange import import_embeddings
    from genrec_dist.artifacts.reader import EmbeddingStore

    with new_folder(out, "imported", source.name) as building:
        ledger = import_embeddings(source, building, dtype=dtype)  # type: ignore[arg-type]
    store = EmbeddingStore(out)
    console.print(
        f"wrote {escape(str(out))}: {store.num_items:,} rows of width {store.dim}, "
        f"{ledger.total('failed'):,} without an embedding",
        soft_wrap=True,
    )
