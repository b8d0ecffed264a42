"""A one-call catalog build for the catalog tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from genrec_dist.catalog.dataset import Catalog
from genrec_dist.catalog.stage import catalog_stage
from genrec_dist.config import CatalogConfig, Config, RuntimeConfig
from genrec_dist.pipeline import StageContext


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Catalog]:
    """Build a catalog from settings of the catalog section; no k-core unless asked for."""
    count = iter(range(100))

    def run(backend: str = "local", **settings) -> Catalog:
        settings = {"min_user_interactions": 0, "min_item_interactions": 0, **settings}
        out = tmp_path / f"catalog{next(count)}"
        out.mkdir()
        stage = catalog_stage(Config(catalog=CatalogConfig(**settings)))
        stage.build(StageContext(out=out, inputs={}, runtime=RuntimeConfig(backend=backend)))
        return Catalog(out, settings.get("order", "time"))

    return run
