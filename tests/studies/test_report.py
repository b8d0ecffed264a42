"""The report of a fake run: renders whatever the run has, shows its numbers, fetches nothing, escapes everything."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_run import HOSTILE, FakeRun, full_run

from genrec_dist.artifacts.files import append_jsonl, read_json, write_json
from genrec_dist.errors import ConfigError
from genrec_dist.studies import paper, tsne
from genrec_dist.studies.report import write_report

VOID = {"meta", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """Checks nesting, and collects ids, links, tags, text by section and table rows."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(self.source)
        self.close()
        assert self.open == [], f"tags left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def row(self, label: str) -> list[str]:
        """The first table row whose first cell is `label`."""
        return next(row for row in self.rows if row and row[0] == label)


@pytest.fixture(scope="module")
def beauty(tmp_path_factory) -> FakeRun:
    root = tmp_path_factory.mktemp("beauty")
    return full_run(root, name="beauty", catalog={"source": "parquet", "path": "data/Beauty"})


@pytest.fixture(scope="module")
def page(beauty) -> Page:
    return Page(write_report(beauty.run))


def test_every_section_is_there(page):
    sections = {"result", "metrics", "ranks", "beam", "training", "identifiers", "embeddings", "data", "stages"}
    assert sections | {"settings"} <= set(page.ids)
    assert page.tags.count("svg") == 1 + 1 + 3 + 2 + 2  # result, ranks, three curves, codebook, similarity and maps


def test_one_small_file_that_fetches_nothing(page, beauty):
    assert len(page.source) < 3_000_000
    assert page.references
    assert all(r.startswith(("#", "data:image/png")) for r in page.references)
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not {"script", "link", "iframe", "img", "object", "base"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", page.source)


def test_ids_are_unique_and_every_inner_link_has_a_target(page):
    assert len(page.ids) == len(set(page.ids))
    inner = {r[1:] for r in page.references if r.startswith("#")}
    assert inner <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(page.ids)


def test_numbers_of_the_result(page, beauty):
    main = read_json(beauty.run.path / "metrics.json")["main"]
    low, high = main["intervals"]["recall@10"]
    cells = page.row("this run (prorec)")
    assert cells[1] == f"{main['test']['recall@10']:.4f}{low:.4f}–{high:.4f}"
    assert page.row("PRORec, paper Table 3")[1:] == ["0.0939", "0.1289", "0.0559", "0.0646"]
    assert page.row("test, users without same-day ties")[1] == "200"
    assert "beam width 50" in page.text
    assert "mix weight 0.3" in page.text
    assert "Order: time." in page.text
    assert f"{main['test']['recall@10'] / 0.0939:.2f} × the paper's PRORec" in page.text
    assert "93.8% of the beam's top 10" in page.text
    assert page.row("paper, concat")[1:] == ["97.33%", "2.67%"]
    assert page.row("interactions") == ["interactions", "198,502", "198,360"]


def test_everything_from_the_data_is_escaped(page):
    assert "<script" not in page.source.lower()
    assert HOSTILE in page.text  # shown as text
    assert page.text.count(HOSTILE) >= 4  # titles and brands, the ledger's reason, the command, the configuration


def test_stages_say_what_was_built_and_reused(page):
    assert page.row("catalog")[1:3] == ["reused", "–"]
    assert page.row("generator")[1:3] == ["built", "12.5 s"]


def test_second_report_uses_the_stored_maps(beauty, page, monkeypatch):
    def refuse(*_):
        raise AssertionError("t-SNE ran again")

    monkeypatch.setattr(tsne, "_lay_out", refuse)
    again = Page(write_report(beauty.run))
    assert again.source == page.source


def test_damaged_or_stale_maps_are_made_again(tmp_path):
    fake = full_run(tmp_path)
    write_report(fake.run)
    cache = fake.run.path / tsne.CACHE
    with np.load(cache, allow_pickle=False) as stored:
        good = dict(stored)
    assert tsne._load(cache, "another key") is None
    cache.write_bytes(cache.read_bytes()[:200])
    assert tsne._load(cache, str(good["key"])) is None
    write_report(fake.run)
    assert tsne._load(cache, str(good["key"]))["points0"].tolist() == good["points0"].tolist()


def test_synthetic_catalog_speaks_of_its_oracle(tmp_path):
    oracle = {"recall@10": 0.5, "recall@20": 0.6, "ndcg@10": 0.3}
    fake = full_run(tmp_path, oracle, report={"tsne_items": 0}, catalog={"source": "synthetic"})
    page = Page(write_report(fake.run))
    recall = read_json(fake.run.path / "metrics.json")["main"]["test"]["recall@10"]
    assert f"{100 * recall / 0.5:.1f}% of the oracle (0.5000)" in page.text
    assert page.row("oracle (planted structure)")[1:] == ["0.5000", "0.6000", "0.3000", "–"]
    assert "paper Table 3" not in page.text


def test_file_order_is_said(tmp_path):
    catalog = {"source": "parquet", "path": "elsewhere", "order": "file"}
    fake = full_run(tmp_path, report={"tsne_items": 0, "paper_table": "toys"}, catalog=catalog)
    page = Page(write_report(fake.run))
    assert "Order: file." in page.text
    assert page.row("PRORec, paper Table 3")[1] == "0.0822"


def test_run_that_only_started(tmp_path):
    fake = FakeRun(tmp_path)
    page = Page(write_report(fake.run))
    assert "no evaluation yet" in page.text
    assert [i for i in page.ids if i in ("result", "stages", "training")] == []


def test_popularity_run_has_no_other_stages(tmp_path):
    fake = FakeRun(tmp_path, method="popularity", references=[])
    fake.catalog()
    main = fake.evaluation("popularity", "evaluation", 0.01, beam=None)
    del main["intervals"], main["valid"]
    main["without_ties"] = {"users": 0}
    fake.summary(main, {})
    page = Page(write_report(fake.run))
    assert page.row("this run (popularity)")[1] == f"{main['test']['recall@10']:.4f}"
    assert "beam width" not in page.text
    assert not any(row and row[0].startswith("test, users without") for row in page.rows)


@pytest.mark.parametrize("missing", ["catalog", "semantic", "fusion", "identifiers", "generator", "evaluation"])
def test_any_stage_may_be_missing(tmp_path, missing):
    fake = full_run(tmp_path, report={"tsne_items": 12})
    links = fake.run.links()
    del links[missing]
    write_json(fake.run.path / "artifacts.json", links)
    (fake.run.path / "metrics.json").unlink()
    page = Page(write_report(fake.run))
    assert "settings" in page.ids
    assert ("result" in page.ids) == (missing != "evaluation")
    assert ("identifiers" in page.ids) == (missing != "identifiers")


def identifiers_only(root: Path) -> tuple[FakeRun, Path]:
    """A run with codes, and their artifact."""
    fake = FakeRun(root, report={"tsne_items": 0})
    fake.catalog()
    fake.embeddings()
    fake.identifiers()
    return fake, fake.run.path / fake.run.links()["identifiers"]["path"]


def test_codebook_figures(tmp_path):
    fake, _ = identifiers_only(tmp_path)
    page = Page(write_report(fake.run))
    for title in ("entropy of the codes, bits", "perplexity / K", "variance explained", "share of nodes by size"):
        assert title in page.text
    assert "nodes split" not in page.text
    assert "≈" not in page.text
    assert "k-means" not in page.text


def test_curves_of_kmeans(tmp_path):
    fake, codebook = identifiers_only(tmp_path)
    splits = [
        ([], 300, [8.0, 6.0, 5.0, 4.0], [3, 1, 0, 0]),
        ([0], 100, [3.0, 2.0], [0, 2]),
        ([1], 200, [1.0, 1.0, 1.0], [0, 0, 1]),
    ]
    for path, rows, objective, refilled in splits:
        record = {"path": path, "rows": rows, "objective": objective, "imbalance": [2.0] * len(objective)}
        append_jsonl(codebook / "kmeans.jsonl", record | {"splits": refilled})
    for path in ([2], [0, 3]):
        append_jsonl(codebook / "kmeans.jsonl", {"path": path, "rows": 70})  # identical rows
    page = Page(write_report(fake.run))
    assert "objective / first" in page.text
    assert "k-means of all 300 items" in page.text
    start = next(i for i, row in enumerate(page.rows) if "nodes split" in row)
    assert page.rows[start + 1 : start + 4] == [
        ["1", "1", "300", "4.0", "4", "50.0%"],
        ["2", "3", "370", "2.5", "3", "75.0%"],
        ["3", "1", "70", "–", "0", "–"],
    ]


def test_residual_kmeans_has_one_split_a_level(tmp_path):
    fake, codebook = identifiers_only(tmp_path)
    for level in range(2):
        course = {"objective": [4.0, 3.0 - level], "imbalance": [1.5, 1.2], "splits": [level, 0]}
        append_jsonl(codebook / "kmeans.jsonl", {"level": level, "rows": 300, **course})
    page = Page(write_report(fake.run))
    assert page.text.count("objective / first") == 1
    assert ["1", "1", "300", "2.0", "0", "75.0%"] in page.rows
    assert ["2", "1", "300", "2.0", "1", "50.0%"] in page.rows


def test_kmeans_of_identical_rows_has_no_curve(tmp_path):
    fake, codebook = identifiers_only(tmp_path)
    append_jsonl(codebook / "kmeans.jsonl", {"path": [], "rows": 300})
    page = Page(write_report(fake.run))
    assert "objective / first" not in page.text
    assert ["1", "1", "300", "–", "0", "–"] in page.rows


def test_estimated_variance_is_marked(tmp_path):
    fake, codebook = identifiers_only(tmp_path)
    quality = read_json(codebook / "quality.json")
    quality["levels"][1] |= {"variance_explained": 0.5, "variance_sample": 0.25}
    write_json(codebook / "quality.json", quality)
    page = Page(write_report(fake.run))
    assert "≈ 50.0%" in [row[-1] for row in page.rows]
    assert "share of the items in them: level 2 25.0%" in page.text


def test_unknown_table_of_the_paper_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"report\.paper_table"):
        full_run(tmp_path, report={"paper_table": "books", "tsne_items": 0})


def test_numbers_of_the_paper_are_consistent():
    for rows in paper.PERFORMANCE.values():
        assert len(rows) == 11
        for values in rows.values():
            assert values["recall@10"] < values["recall@20"]
            assert values["ndcg@10"] < values["ndcg@20"] < values["recall@20"]
    ours = paper.PERFORMANCE["beauty"]["PRORec"]
    assert paper.FUSION_VARIANTS["ours"] == ours == paper.TASK_VARIANTS["alignment and distillation"]
    assert paper.FUSION_VARIANTS["concat"] == paper.TASK_VARIANTS["neither task"]
    assert all(sum(row.values()) == pytest.approx(1) for row in paper.MODALITY_SIMILARITY.values())
    eager = paper.PERFORMANCE["beauty"]["EAGER"]  # the improvements that section 4.2 states
    assert ours["recall@20"] / eager["recall@20"] - 1 == pytest.approx(0.1468, abs=1e-4)
    assert ours["ndcg@20"] / eager["ndcg@20"] - 1 == pytest.approx(0.0785, abs=1e-4)
