"""Writing a study: study.html, study.json and a CSV a table into the study's folder. Computes no result.

The page says what every run says of itself: commit, hardware, seed, order of interactions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrec_dist import __version__
from genrec_dist.artifacts.files import write_atomic, write_json
from genrec_dist.studies.blocks import NONE, Block, Section, Table, Text, seconds
from genrec_dist.studies.grid import Grid
from genrec_dist.studies.ordering import POOLING, Verdict
from genrec_dist.studies.report import render
from genrec_dist.studies.study_data import StudyData


@dataclass
class StudyPage:
    """What a page function makes of a study's runs.

    Args:
        verdict: whether the paper's ordering holds.
        grids: tables, each a CSV file as well.
        sections: the page between the verdict and the runs.
        facts: further numbers for study.json.
    """

    verdict: Verdict
    grids: Sequence[Grid]
    sections: Sequence[Section]
    facts: dict[str, Any] = field(default_factory=dict)


def write_study(data: StudyData, page: StudyPage, source: str) -> Path:
    """Write the three forms of a study.

    Args:
        data: its runs.
        page: what its page function made of them.
        source: configuration file, as named by the user.

    Returns:
        Path of study.html.
    """
    runs = data.run_facts()
    record = {
        "study": data.name,
        "title": data.title,
        "config": source,
        "data_set": data.data_set,
        "order": data.order,
        "seeds": list(data.seeds),
        "identifiers_only": data.identifiers_only,
        "verdict": page.verdict.as_dict(),
        "tables": {grid.name: grid.as_dict() for grid in page.grids},
        **page.facts,
        "variants": {v.name: {"label": v.label, "overrides": list(v.overrides)} for v in data.variants},
        "runs": runs,
        "missing": data.missing,
        "genrec_dist": __version__,
    }
    write_json(data.folder / "study.json", record)
    for grid in page.grids:
        write_atomic(data.folder / f"{grid.name}.csv", grid.csv().encode())
    html = render(
        "study.html",
        kind="study",
        name=data.title,
        protocol=_protocol(data, runs),
        tiles=[],
        verdict=page.verdict,
        missing=data.missing,
        sections=[*page.sections, runs_section(data)],
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    path = data.folder / "study.html"
    write_atomic(path, html.encode())
    return path


def _protocol(data: StudyData, runs: list[dict]) -> str:
    """Seeds, order, users, commit and hardware in one line."""
    parts = [f"configuration {data.config.name}", f"order {data.order}"]
    parts.append(f"{'seed' if len(data.seeds) == 1 else 'seeds'} {', '.join(map(str, data.seeds))}")
    users = [run.main["users"] for run in data.runs.values() if run.main and "users" in run.main]
    if users:
        parts.append(f"{max(users):,} users, all items ranked")
    commits = dict.fromkeys(_commit(run) for run in runs)
    parts += [f"commit {', '.join(commits)}"] if commits else []
    parts += dict.fromkeys(run["hardware"] for run in runs)
    return " · ".join(parts)


def _commit(run: dict) -> str:
    if not run["commit"]:
        return "unknown"
    return run["commit"][:10] + (" with changes" if run["dirty"] else "")


def runs_section(data: StudyData) -> Section:
    """Every run, and what makes each variant."""
    overrides = [[v.label, ", ".join(v.overrides)] for v in data.variants]
    settings = Table(["variant", "differs from the configuration by"], overrides, text_columns={0, 1})
    blocks: list[Block] = [runs_table(data), settings, Text(POOLING, note=True)]
    return Section("runs", "Runs", blocks)


def runs_table(data: StudyData) -> Table:
    """Every run with its commit, hardware and time."""
    rows = [
        [
            data.labels[run["variant"]],
            str(run["seed"]),
            run["run"],
            _commit(run),
            run["hardware"],
            (run["started"] or NONE).replace("T", " ").removesuffix("Z"),
            seconds(run["build_seconds"]),
        ]
        for run in data.run_facts()
    ]
    caption = (
        "Commit and hardware are those of the last command in each run. Build time: stages that the run itself built; "
        "artifacts that variants share are built once. Each run has a report of its own (report.html in its folder)."
    )
    return Table(
        ["variant", "seed", "run", "commit", "hardware", "started, UTC", "build time"], rows, caption, {0, 2, 3, 4, 5}
    )
