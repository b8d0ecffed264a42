"""Fixtures shared by all tests: one Ray session, and the folder of the real data sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genrec_dist.cluster import ensure_ray, leave_ray
from genrec_dist.config import RuntimeConfig

DATA_SETS = ("beauty", "sports", "toys")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """The `ray` module with one private session, shared by every test that asks for it."""
    yield ensure_ray(RuntimeConfig())
    leave_ray()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with beauty/, sports/ and toys/; the test is skipped where it is absent."""
    root = Path(__file__).resolve().parents[1]
    named = os.environ.get("GENREC_DATA")
    folders = [Path(named)] if named else [root.parent / "shared" / "data"]
    for folder in folders:
        if all((folder / name / "interactions.parquet").is_file() for name in DATA_SETS):
            return folder
    pytest.skip(f"real data sets {', '.join(DATA_SETS)} not found in {folders[0]}; set $GENREC_DATA")
