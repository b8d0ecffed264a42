"""One page of a paper's tables and figures: reproduce.html, reproduce.json and a CSV a table. Computes no result.

Every part is a study's page on one data set in one order of interactions; here they are put one below the other, under
a table of their verdicts and one of PRORec's Table 3 over all data sets and orders.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import Markup

from genrec_dist import __version__
from genrec_dist.artifacts.files import write_atomic, write_json
from genrec_dist.runs import command_words
from genrec_dist.studies import paper
from genrec_dist.studies.blocks import NONE, Block, Figure, Section, Table, Text, number
from genrec_dist.studies.grid import DERIVED, OURS, PAPER, Column, Grid, Row, signed_percent
from genrec_dist.studies.ordering import POOLING
from genrec_dist.studies.recipes import read_recipe
from genrec_dist.studies.report import render
from genrec_dist.studies.results import HEADLINE, metric_label
from genrec_dist.studies.study_data import Pooled, StudyData
from genrec_dist.studies.study_page import StudyPage, runs_table

PAPER_TITLES = {"prorec": "PRORec", "csj_id": "CSJ-ID"}


@dataclass(frozen=True)
class Part:
    """One table or figure on one data set in one order.

    Args:
        title: 'Table 5'.
        data_set: of its runs.
        order: of interactions.
        data: its runs.
        page: what its study makes of them.
        source: its configuration.
    """

    title: str
    data_set: str
    order: str
    data: StudyData
    page: StudyPage
    source: Path

    @property
    def id(self) -> str:
        """Unique on the page, and a file name."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.title} {self.data_set} {self.order}".lower())

    @property
    def heading(self) -> str:
        return f"{self.title} · {self.data_set.capitalize()} · order {self.order}"


def write_reproduction(folder: Path, name: str, parts: Sequence[Part], command: list[str]) -> Path:
    """Write the three forms of a reproduction.

    Args:
        folder: of the page.
        name: of the paper.
        parts: in the order of the page.
        command: as typed.

    Returns:
        Path of reproduce.html.
    """
    grids = [(part, grid) for part in parts for grid in part.page.grids]
    overview, words = _table3(parts), command_words(command)
    record = {
        "paper": name,
        "command": words,
        "parts": [_record(part) for part in parts],
        **({"table_3": overview.as_dict()} if overview else {}),
        "genrec_dist": __version__,
    }
    write_json(folder / "reproduce.json", record)
    for part, grid in grids:
        write_atomic(folder / f"{part.id}-{grid.name}.csv", grid.csv().encode())
    sections = [_verdicts(parts)]
    if overview:
        write_atomic(folder / "table-3.csv", overview.csv().encode())
        sections.append(Section("table-3", "Table 3 in all", [overview.table(), *_recorded(parts)]))
    sections += [section for part in parts for section in _sections(part)]
    sections.append(_runs(parts))
    html = render(
        "reproduce.html",
        kind="reproduction",
        name=f"{PAPER_TITLES[name]}: tables and figures, the paper's and ours",
        command=" ".join(words),
        protocol=_protocol(parts),
        tiles=[],
        missing=[f"{part.heading}: {what}" for part in parts for what in part.data.missing],
        sections=sections,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    path = folder / "reproduce.html"
    write_atomic(path, html.encode())
    return path


def _record(part: Part) -> dict:
    return {
        "item": part.title,
        "study": part.data.name,
        "data_set": part.data_set,
        "order": part.order,
        "config": str(part.source),
        "seeds": list(part.data.seeds),
        "verdict": part.page.verdict.as_dict(),
        "tables": {grid.name: grid.as_dict() for grid in part.page.grids},
        **part.page.facts,
        "runs": part.data.run_facts(),
        "missing": part.data.missing,
    }


def _protocol(parts: Sequence[Part]) -> str:
    """Data sets, orders, seeds and hardware in one line."""
    sets = dict.fromkeys(part.data_set.capitalize() for part in parts)
    orders = dict.fromkeys(part.order for part in parts)
    seeds = dict.fromkeys(seed for part in parts for seed in part.data.seeds)
    hardware = dict.fromkeys(run["hardware"] for part in parts for run in part.data.run_facts())
    said = [", ".join(sets), f"order {', '.join(orders)}", f"seeds {', '.join(map(str, seeds))}", "all items ranked"]
    return " · ".join([*said, *hardware])


def _verdicts(parts: Sequence[Part]) -> Section:
    """Whether each printed ordering holds, first of all."""
    rows = [
        [part.title, part.data_set.capitalize(), part.order, part.page.verdict.holds, part.page.verdict.sentence]
        for part in parts
    ]
    caption = "Holds: yes, no, in part, or unknown while runs that it needs are missing."
    table = Table(["", "data set", "order", "holds", "verdict"], rows, caption, {0, 1, 2, 3, 4})
    return Section("verdicts", "Do the paper's orderings hold?", [table, Text(POOLING, note=True)])


def _table3(parts: Sequence[Part]) -> Grid | None:
    """PRORec and the printed row over all data sets and orders; None without Table 3."""
    rows: list[Row] = []
    for data_set in paper.DATA_SETS:
        mine = [part for part in parts if part.data.name == "performance" and part.data_set == data_set]
        printed = paper.PERFORMANCE[data_set]["PRORec"]
        for part in mine:
            values = {n: part.data.metric("prorec", n) for n in HEADLINE}
            if not any(values.values()):
                continue
            rows.append(Row(f"{data_set.capitalize()}, order {part.order}", OURS, dict(values)))
            shares: dict[str, Pooled | float | None] = {
                name: value.mean / printed[name] - 1 for name, value in values.items() if value is not None
            }
            rows.append(Row("against the paper", DERIVED, shares, signed_percent))
        if mine:
            rows.append(Row(f"{data_set.capitalize()}, paper", PAPER, dict(printed)))
    if not rows:
        return None
    caption = (
        "PRORec: mean ± standard deviation over the seeds; below it the lowest lower and highest upper bound of the "
        "seeds' 95% bootstrap intervals over users. The paper states neither its order of interactions nor intervals."
    )
    return Grid("table-3", "", [Column(name, metric_label(name)) for name in HEADLINE], rows, caption)


def _recorded(parts: Sequence[Part]) -> list[Block]:
    """What the frozen recipes record of an earlier run, beside this one."""
    said = []
    for part in parts:
        if part.data.name != "performance" or part.source.parent.name != "frozen":
            continue
        recipe, found = read_recipe(part.source), part.data.metric("prorec", "recall@10")
        if recipe.result is None or found is None:
            continue
        mean, deviation = recipe.result["recall@10"]
        said.append(
            f"{part.data_set.capitalize()}, order {part.order}: {number(mean)} ± {number(deviation)} recorded on "
            f"{recipe.date} ({recipe.hardware}, commit {recipe.commit}), {number(found.mean)} here"
        )
    return [Text(f"Recall@10 as the frozen recipes record it: {'; '.join(said)}.", note=True)] if said else []


def _sections(part: Part) -> list[Section]:
    """A study's sections under the part's heading, their ids unique on the shared page."""
    found = []
    for place, section in enumerate(part.page.sections):
        blocks = [
            replace(block, svg=_rescoped(block.svg, part.id)) if isinstance(block, Figure) else block
            for block in section.blocks
        ]
        if place == 0:
            blocks.insert(0, Text(part.page.verdict.sentence))
        title = part.heading if place == 0 else f"{part.heading} · {section.title}"
        found.append(Section(f"{part.id}-{section.id}", title, blocks))
    return found


def _rescoped(svg: Markup, prefix: str) -> Markup:
    """A figure whose ids bear a prefix: two of the same kind may stand on one page."""
    text = re.sub(r'\bid="', f'id="{prefix}-', str(svg))
    return Markup(text.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-"))


def _runs(parts: Sequence[Part]) -> Section:
    """Every run of every part."""
    rows = []
    for part in parts:
        rows += [[part.heading, *row] for row in runs_table(part.data).rows]
    if not parts:
        return Section("runs", "Runs", [Text(NONE)])
    table = runs_table(parts[0].data)
    head, columns = ["", *table.head], {0} | {column + 1 for column in table.text_columns}
    return Section("runs", "Runs", [Table(head, rows, table.caption, columns)])
