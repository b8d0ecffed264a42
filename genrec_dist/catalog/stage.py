"""The catalog stage: input files (or the synthetic catalog) -> the artifact that dataset.py reads."""

from __future__ import annotations

import shutil
from pathlib import Path

from genrec_dist.artifacts.files import sha256_file
from genrec_dist.artifacts.ledger import Ledger
from genrec_dist.catalog.assemble import assemble
from genrec_dist.catalog.ingest import ingest
from genrec_dist.catalog.locate import InputFiles, locate_inputs
from genrec_dist.catalog.output import write_catalog
from genrec_dist.catalog.synth import GENERATOR_VERSION, write_synthetic
from genrec_dist.config import CatalogConfig, Config
from genrec_dist.errors import DataError
from genrec_dist.pipeline import Stage, StageContext

VERSION = 1
_checksums: dict[tuple[str, int, int], str] = {}


def catalog_stage(config: Config) -> Stage:
    """The stage that builds the catalog of a run.

    Its content hash covers the bytes of the input files, not where they lie, and not `catalog.order`: the
    order is a view that readers take (see dataset.py), so that both orders share the text embeddings.

    Args:
        config: the whole configuration; only `catalog` is read.

    Raises:
        DataError: the input files are not found.
    """
    catalog = config.catalog
    settings = catalog.model_dump(mode="json", exclude={"path", "interactions", "items", "synthetic", "order"})
    if catalog.source == "synthetic":
        settings["synthetic"] = catalog.synthetic.model_dump(mode="json") | {"version": GENERATOR_VERSION}
        return Stage("catalog", VERSION, settings, {}, lambda ctx: _build_synthetic(catalog, ctx))
    files = locate_inputs(catalog)
    settings["files"] = {
        role: [{"name": file.name, "sha256": _checksum(file.path)} for file in getattr(files, role)]
        for role in ("interactions", "items")
    }
    return Stage("catalog", VERSION, settings, {}, lambda ctx: build_catalog(catalog, files, ctx))


def build_catalog(catalog: CatalogConfig, files: InputFiles, ctx: StageContext) -> None:
    """Build the artifact into `ctx.out`.

    Args:
        catalog: the catalog section.
        files: input files.
        ctx: output folder, runtime, progress.

    Raises:
        DataError: unreadable input or too many bad rows; the ledger so far is left in the scratch folder.
    """
    shards, names = {}, {}
    steps = ("interactions", "items")
    for step, role in enumerate(steps):
        ctx.progress(step, 4, "steps", step=f"reading {role}")
        role_files = getattr(files, role)
        names[role] = [file.name for file in role_files]
        shards[role] = ingest(role_files, catalog.source, role, ctx.scratch / "shards", ctx.runtime)
    ctx.progress(2, 4, "steps", step="filtering and ordering")
    ledger = Ledger()
    try:
        assembled = assemble(catalog, shards, names, ledger)
    except DataError:
        ledger.write(ctx.scratch)
        raise
    ctx.progress(3, 4, "steps", step="writing")
    write_catalog(assembled, ctx.out)
    ledger.write(ctx.out)
    for reason, actions in ledger.summary().items():
        ctx.event("ledger", reason=reason, **actions)
    ctx.progress(4, 4, "steps", step="done")


def _build_synthetic(catalog: CatalogConfig, ctx: StageContext) -> None:
    raw = ctx.scratch / "raw"
    finished = raw / "oracle.json"  # written last
    if not finished.exists():
        shutil.rmtree(raw, ignore_errors=True)
        settings = catalog.synthetic
        write_synthetic(raw, settings.num_items, settings.num_users, settings.seed)
    located = catalog.model_copy(update={"source": "amazon2014", "path": str(raw)})
    build_catalog(located, locate_inputs(located), ctx)
    for name in ("oracle.json", "oracle.parquet"):
        shutil.copyfile(raw / name, ctx.out / name)


def _checksum(path: Path) -> str:
    """SHA-256 of a file, computed once a process unless the file changes."""
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _checksums:
        _checksums[key] = sha256_file(path)
    return _checksums[key]
