"""Everything the report reads from a run folder and its artifacts, in one place; any part may be missing.

Reads config.yaml, provenance.json, metrics.json, metrics.jsonl, events.jsonl and artifact folders; writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from genrec_dist.artifacts.files import read_json
from genrec_dist.artifacts.store import MANIFEST
from genrec_dist.config import Config
from genrec_dist.errors import ConfigError, GenrecError
from genrec_dist.runs import RunFolder
from genrec_dist.studies import paper

EVALUATION = "evaluation"


@dataclass(frozen=True)
class RunData:
    """Tolerant view of one run: what is not there is None or empty, never an error."""

    run: RunFolder

    @cached_property
    def config(self) -> Config:
        return self.run.config()

    @property
    def config_text(self) -> str:
        return (self.run.path / "config.yaml").read_text(encoding="utf-8")

    @cached_property
    def links(self) -> dict[str, dict]:
        return self.run.links()

    @cached_property
    def events(self) -> list[dict]:
        return self.run.events()

    @property
    def provenance(self) -> dict:
        file = self.run.path / "provenance.json"
        return read_json(file) if file.is_file() else {}

    def folder(self, title: str) -> Path | None:
        """Folder of a finished artifact of this run, None when there is none."""
        link = self.links.get(title)
        try:
            folder = self.run.folder_of(link) if link else None
        except GenrecError:
            return None
        return folder if folder is not None and (folder / MANIFEST).is_file() else None

    def json(self, title: str, name: str) -> Any:
        """A JSON file of an artifact, None when the artifact or the file is missing."""
        folder = self.folder(title)
        return read_json(folder / name) if folder is not None and (folder / name).is_file() else None

    def key(self, title: str) -> str:
        return self.links[title]["key"]

    @cached_property
    def curves(self) -> dict[str, list[dict]]:
        """Training records by stage, in the order the stages ran."""
        stages: dict[str, list[dict]] = {}
        for record in self.run.metrics():
            stages.setdefault(record.get("stage", "training"), []).append(record)
        return stages

    @cached_property
    def _summary(self) -> dict:
        file = self.run.path / "metrics.json"
        return read_json(file) if file.is_file() else {}

    @property
    def main(self) -> dict | None:
        """Evaluation of the run's own method."""
        return self._summary.get("main") or self.json(EVALUATION, "metrics.json")

    @property
    def references(self) -> dict[str, dict]:
        """Evaluations of the reference methods by name, in the configured order."""
        known = self._summary.get("references", {})
        found = {
            name: known.get(name) or self.json(f"{EVALUATION} {name}", "metrics.json")
            for name in [*self.config.active_references, *known]
        }
        return {name: metrics for name, metrics in found.items() if metrics}

    @cached_property
    def ranks(self) -> dict[str, np.ndarray]:
        """Ranks of the held-out items by method, the run's own method first.

        Shapes:
            each: (num_users,) int32, 1-based, 0 = not in the list.
        """
        titles = {self.config.method: EVALUATION} | {n: f"{EVALUATION} {n}" for n in self.references}
        ranks = {}
        for method, title in titles.items():
            folder = self.folder(title)
            if folder is not None and (folder / "ranks.parquet").is_file():
                ranks[method] = pq.read_table(folder / "ranks.parquet", columns=["rank"])["rank"].to_numpy()
        return ranks

    @property
    def data_set(self) -> str | None:
        """Data set of the paper's tables that this run is on, None when it is another.

        Raises:
            ConfigError: `report.paper_table` names none of them.
        """
        named = self.config.report.paper_table
        if named is not None and named.lower() not in paper.DATA_SETS:
            raise ConfigError(
                "the paper has no such data set", where="report.paper_table", got=named, expected=paper.DATA_SETS
            )
        path = self.config.catalog.path if self.config.catalog.source != "synthetic" else None
        guess = named or (Path(path).name if path else "")
        return guess.lower() if guess.lower() in paper.DATA_SETS else None

    @property
    def oracle(self) -> dict[str, float]:
        """Metrics of the best possible recommender, known for synthetic catalogs only."""
        return _find_metrics(self.json("catalog", "oracle.json"))


def _find_metrics(value: Any) -> dict[str, float]:
    """The outermost mapping that holds `recall@k` numbers."""
    if not isinstance(value, dict):
        return {}
    own = {k: v for k, v in value.items() if "@" in k and isinstance(v, int | float)}
    return own or next(filter(None, map(_find_metrics, value.values())), {})
