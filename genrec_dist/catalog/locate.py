"""Finding the input files of a catalog. Reads folder listings only; opens no data file."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from genrec_dist.config import CatalogConfig
from genrec_dist.errors import DataError

# Patterns are tried in order; the first that matches a file is taken, whole.
DEFAULTS: dict[str, dict[str, tuple[str, ...]]] = {
    "parquet": {
        "interactions": ("interactions.parquet",),
        "items": ("items.parquet",),
    },
    "amazon2014": {
        "interactions": (
            "reviews_*.json.gz",
            "reviews_*.json",
            "ratings_*.csv",
            "ratings_*.csv.gz",
        ),
        "items": ("meta_*.json.gz", "meta_*.json"),
    },
    "amazon2018": {
        "interactions": ("*.json.gz", "*.json"),
        "items": ("meta_*.json.gz", "meta_*.json"),
    },
    "amazon2023": {
        "interactions": ("*.jsonl.gz", "*.jsonl"),
        "items": ("meta_*.jsonl.gz", "meta_*.jsonl"),
    },
}


@dataclass(frozen=True)
class InputFile:
    """One input file.

    Args:
        path: where it is.
        name: what ledger and content hash call it: relative to the data set's folder, else the file name.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class InputFiles:
    """All input files of a catalog, in the order in which their rows count."""

    interactions: list[InputFile]
    items: list[InputFile]


def locate_inputs(catalog: CatalogConfig) -> InputFiles:
    """Find the files of a catalog (any source but 'synthetic').

    Args:
        catalog: `path` is a folder: an absolute one as it is, a relative one as it is, then under
            $GENREC_DATA, ./data and ../shared/data. `interactions` and `items` are names or globs in it, or
            absolute; without them the usual names of the source.

    Raises:
        DataError: nothing found; the message names every place looked at.
    """
    folder = _find_folder(catalog.path or ".")
    return InputFiles(
        interactions=_find_files(folder, catalog.interactions, catalog.source, "interactions"),
        items=_find_files(folder, catalog.items, catalog.source, "items"),
    )


def _find_folder(path: str) -> Path:
    given = Path(path).expanduser()
    if given.is_absolute():
        places = [given]
    else:
        named = os.environ.get("GENREC_DATA")
        roots = [Path(), *([Path(named).expanduser()] if named else []), Path("data"), Path("../shared/data")]
        places = [root / given for root in roots]
    for place in places:
        if place.is_dir():
            return place.resolve()
    raise DataError(
        "no such data folder",
        where="catalog.path",
        got=path,
        expected="a folder; looked at " + ", ".join(str(place.absolute()) for place in places),
        fix="set catalog.path, or $GENREC_DATA to the folder that holds the data sets",
    )


def _find_files(folder: Path, setting: str | None, source: str, role: str) -> list[InputFile]:
    patterns = (setting,) if setting else DEFAULTS[source][role]
    tried = []
    for pattern in patterns:
        where = Path(pattern).expanduser()
        where = where if where.is_absolute() else folder / where
        tried.append(str(where))
        matches = [where] if where.is_file() else [Path(name) for name in glob.glob(str(where), recursive=True)]
        files = sorted(path.resolve() for path in matches if path.is_file())
        if role == "interactions" and not setting:
            files = [path for path in files if not path.name.startswith("meta_")]
        if files:
            return [InputFile(path, _name(path, folder)) for path in files]
    raise DataError(
        f"no {role} file",
        where=f"catalog.{role}",
        got=setting or f"nothing, so the usual names of source '{source}'",
        expected="a file; looked at " + ", ".join(tried),
        fix=f"set catalog.{role} to the file's name or a glob",
    )


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
