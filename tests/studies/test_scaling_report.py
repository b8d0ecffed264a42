"""The scaling report of made-up trials: in a browser, as files, with runs missing, and with next to nothing in it."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import Chromium, chromium
from made_trials import DEPTHS, power, sweep

from genrec_dist.artifacts.files import read_json
from genrec_dist.errors import DataError
from genrec_dist.studies.scaling.plot import end_labels, log_ticks, scientific, si
from genrec_dist.studies.scaling.report import rewrite_report, write_report
from genrec_dist.studies.scaling.trials import Trial, record_of, study_record

HOSTILE = "</script><script>alert('x')</script>&<b>"
FACTS = {"data": "made up", "order": "time", "generator": "of the tests"}
FIGURES = {
    "by-depth", "loss", "excess-loss", "loss-other-counts", "metrics", "extrapolation", "seed-spread", "costs",
    "learning-curves", "lowest-loss",
}  # fmt: skip
DRAWN = """[...document.querySelectorAll('.canvas')].map(c => [c.id, c.querySelectorAll('svg .trace').length,
    Math.round(c.querySelector('.main-svg').getBoundingClientRect().width - c.clientWidth)])"""
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def two_arms() -> list[Trial]:
    """PRORec by a power law; HSTU best at eight layers, one depth of it without numbers."""
    hstu = sweep("hstu", power(8.6, 1.2, 0.4), lambda depth: 0.05 - 0.002 * (np.log2(depth) - 3) ** 2, seed=1)
    kept = [trial for trial in hstu if trial.depth != 24]
    lost = [
        Trial("hstu-l24-s0", "hstu", 24, 0, "failed", f"CUDA out of memory {HOSTILE}"),
        Trial("hstu-l24-s1", "hstu", 24, 1, "running"),
        Trial("hstu-l24-s2", "hstu", 24, 2, "pending"),
    ]
    return sweep() + kept + lost


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    """One browser for all tests; those that need it are skipped where there is none."""
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_report(two_arms(), tmp_path_factory.mktemp("sweep"), f"layers {HOSTILE}", FACTS, num_resamples=60)


def rows_of(page: Path, figure: str) -> list[dict[str, str]]:
    with open(page.parent / "figures" / f"{figure}.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def text_of(page: Path) -> str:
    """The page without its scripts."""
    return re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.S)


def test_every_figure_is_drawn_in_a_browser_without_complaint(page, browser):
    for width in (1280, 390):
        browser.open(page, width)
        drawn = browser.run(DRAWN)
        assert browser.complaints() == []
        assert browser.requests() == [page.resolve().as_uri()]
        assert {name.rsplit("-", 1)[0] for name, _, _ in drawn} == FIGURES
        assert [name for name, traces, _ in drawn if not traces] == []
        assert [name for name, _, excess in drawn if excess > 1] == []
        assert browser.run(WIDER) == 0
    assert browser.run("Plotly.version") is not None
    ink = "getComputedStyle(document.querySelector('.canvas .xtick text')).fill"
    light = browser.run(ink)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.run(f"new Promise(r => setTimeout(() => r({ink}), 50))") != light
    browser.call("Emulation.setEmulatedMedia", features=[])


def test_a_script_that_is_not_the_page_s_own_does_not_run(page, browser, tmp_path):
    """The policy names the two scripts by their hash."""
    source = page.read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", source, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"'sha256-([^']+)'", source.split("</head>")[0]) == hashes
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(source.replace("</body>", "<script>window.strange = 1</script></body>"), encoding="utf-8")
    browser.open(spoilt, 800)
    assert browser.run("window.strange") is None
    assert any("Content Security Policy" in said for said in browser.complaints())


def test_nothing_but_own_files_is_referenced_and_text_is_escaped(page):
    source = text_of(page)
    links = set(re.findall(r'(?:href|src)="([^"]+)"', source))
    assert all(link.startswith("#") or (page.parent / link).is_file() for link in links)
    assert {f"figures/{name}.{ending}" for name in FIGURES for ending in ("csv", "json")} <= links
    assert HOSTILE not in page.read_text(encoding="utf-8")
    assert "CUDA out of memory &lt;/script&gt;" in source


def test_runs_without_numbers_are_listed_and_never_drawn(page):
    source = text_of(page)
    for name in ("hstu-l24-s0", "hstu-l24-s1", "hstu-l24-s2"):
        assert f">{name}</td>" in source
    assert "3 of 48 runs have no numbers" in source
    for figure in FIGURES:
        assert not [row for row in rows_of(page, figure) if row["arm"] == "hstu" and row["depth"] == "24"]
    assert [lost["state"] for lost in read_json(page.parent / "report.json")["without_numbers"]] == [
        "failed", "running", "pending",
    ]  # fmt: skip


def test_files_beside_the_figures_hold_every_run_as_it_was_given(page):
    trials = {(t.arm, t.depth, t.seed): t for t in two_arms() if t.state == "finished"}
    rows = [row for row in rows_of(page, "loss") if row["over"] == "non_embedding"]
    assert len(rows) == len(trials) == 45
    for row in rows:
        trial = trials[row["arm"], int(row["depth"]), int(row["seed"])]
        assert float(row["value"]) == trial.bits_per_item
        assert float(row["x"]) == trial.num_parameters["non_embedding"]
        assert float(row["band_low"]) <= float(row["fitted"]) * 1.001
    held = [row for row in rows_of(page, "extrapolation") if row["arm"] == "prorec"]
    assert {row["depth"] for row in held} == {"24", "32"}
    json_rows = read_json(page.parent / "figures" / "loss.json")["rows"]
    assert len(json_rows) == len(rows_of(page, "loss"))
    assert len(rows_of(page, "learning-curves")) == 45 * 8


def test_the_verdicts_are_on_top_and_in_json(page):
    source, record = text_of(page), read_json(page.parent / "report.json")
    head = source.split("<main>")[0]
    assert "Loss of prorec: A power law in N is supported" in head
    assert "“PRORec goes on improving up to 32 layers”: confirmed." in head
    assert "“HSTU declines beyond 8 layers”: confirmed." in head
    found = {(fit["arm"], fit["over"], fit["quantity"]): fit for fit in record["fits"]}
    assert len(found) == 2 * 4 * 4
    assert found["prorec", "layers", "bits_per_item"]["power_law"]["alpha"] == pytest.approx(0.5, abs=0.1)
    assert not found["hstu", "non_embedding", "ndcg@20"]["power_law_supported"]
    assert "turns back" in found["hstu", "non_embedding", "ndcg@20"]["verdict"]


def test_choices_say_what_nobody_stated(page):
    rows = dict(
        re.findall(r"<tr><td class=\"text\">([^<]+)</td><td class=\"text[^>]*>([^<]+)</td></tr>", text_of(page))
    )
    assert rows["Order of interactions"] == "time"
    assert rows["Schedule"] == rows["Early stopping"] == "not stated"
    assert rows["Generator"] == "of the tests"
    assert rows["Seeds a depth"] == "prorec: 3; hstu: 3"
    assert rows["Hardware"] == "1x H100 80GB"


def test_specifications_are_valid_plotly(page):
    import plotly.graph_objects as go

    specs = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    assert len(specs) > len(FIGURES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spec in specs:
            go.Figure(json.loads(spec))


def no_loss() -> list[Trial]:
    return sweep("hstu", bits=None, depths=DEPTHS[:5])


def bare() -> list[Trial]:
    empty = {"tokens_per_second": None, "peak_memory_bytes": None, "mfu": None, "curve": (), "train_flops": None}
    return [dataclasses.replace(t, **empty) for t in sweep(depths=(2,), seeds=1)]


def unfinished() -> list[Trial]:
    return [Trial("prorec-l1-s0", "prorec", 1, 0, "pending")]


def scored_zero() -> list[Trial]:
    return [dataclasses.replace(t, metrics={"ndcg@20": 0.0}) for t in sweep(depths=(1, 2, 4), seeds=2)]


@pytest.mark.parametrize("made", [no_loss, bare, unfinished, scored_zero])
def test_a_page_is_written_of_whatever_there_is(made, browser, tmp_path):
    path = write_report(made(), tmp_path, "sparse", num_resamples=20)
    assert "<main>" in path.read_text(encoding="utf-8")
    assert read_json(tmp_path / "report.json")["arms"] == [made()[0].arm]
    browser.open(path, 1280)
    assert browser.complaints() == []
    assert [name for name, traces, _ in browser.run(DRAWN) if not traces] == []


def test_a_report_is_written_again_from_its_record_alone(page, tmp_path):
    record = tmp_path / "report.json"
    record.write_bytes((page.parent / "report.json").read_bytes())
    again = rewrite_report(record, num_resamples=60)
    assert record.read_bytes() == (page.parent / "report.json").read_bytes()
    for name in FIGURES:
        assert (tmp_path / f"figures/{name}.csv").read_bytes() == (page.parent / f"figures/{name}.csv").read_bytes()
    written = re.compile(r"Written [0-9 :-]+UTC")
    assert written.sub("", again.read_text()) == written.sub("", page.read_text())


def test_what_a_record_cannot_hold_is_left_out_and_the_rest_comes_back():
    made = sweep(depths=(1,), seeds=1)[0]
    nan = float("nan")
    first, second, *rest = made.curve
    curve = (dataclasses.replace(first, bits_per_item=nan), dataclasses.replace(second, flops=nan), *rest)
    diverged = dataclasses.replace(made, curve=curve, mfu=float("inf"))
    record = {"title": "t", "facts": {}, "trials": [record_of(diverged)]}
    kept = study_record(json.loads(json.dumps(record, allow_nan=False)), Path("x"))
    cleaned = (dataclasses.replace(first, bits_per_item=None), *rest)
    assert kept.trials == [dataclasses.replace(made, curve=cleaned, mfu=None)]


RECORD = {"title": "t", "facts": {}, "trials": []}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ([], "whole file"),
        ({"title": "of an earlier version", "facts": {}}, "trials"),
        (RECORD | {"title": None}, "title"),
        (RECORD | {"facts": {"data": 5}}, "facts.data"),
        (RECORD | {"facts": {"schedule": None}}, "facts.schedule"),
        (RECORD | {"trials": [{"name": "a"}]}, "trials.0.arm"),
        (RECORD | {"trials": [{"name": "a", "arm": "a", "depth": 0, "seed": 0, "state": "pending"}]}, "trials.0.depth"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path, content, said):
    record = tmp_path / "report.json"
    if content is not None:
        record.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=said):
        rewrite_report(record)
    assert not (tmp_path / "report.html").exists()


def test_no_trials_no_report(tmp_path):
    with pytest.raises(DataError, match="without trials"):
        write_report([], tmp_path, "empty")
    assert list(tmp_path.iterdir()) == []


def test_numbers_as_they_are_written():
    assert [si(v) for v in (None, 12.0, 1234.0, 999_950.0, 2.5e6, 3.1e13)] == ["–", "12", "1.23k", "1M", "2.5M", "31T"]
    assert [scientific(4.8e15), scientific(1e-3, 0)] == ["4.80×10¹⁵", "1×10⁻³"]
    assert log_ticks([2.2e5, 6.4e6])["ticktext"] == ["200k", "500k", "1M", "2M", "5M"]
    assert log_ticks([5e14, 1.6e16], power=True)["ticktext"] == ["10¹⁵", "3×10¹⁵", "10¹⁶"]
    assert log_ticks([8.4, 10.0]) == {}


def test_names_at_the_ends_of_curves_keep_apart():
    notes = end_labels([("a", 1, 0.50, "#000000"), ("b", 1, 0.51, "#000000"), ("c", 1, 0.9, "#000000")], 0, 1, 300)
    places = [note["y"] * 300 + note["yshift"] for note in notes]
    assert np.diff(places).min() >= 14
    assert notes[2]["yshift"] == 0
