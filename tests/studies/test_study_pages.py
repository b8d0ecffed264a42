"""Pages of studies from made-up runs: what their sentence says, and what their tables, CSV and JSON hold."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_study import FakeStudy
from test_report import Page

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.files import read_json
from genrec_dist.config import known_keys, load_config, parse_override
from genrec_dist.errors import ConfigError
from genrec_dist.studies import paper
from genrec_dist.studies.catalogue import STUDIES, find_study
from genrec_dist.studies.purity import behaviour_labels, content_labels, neighbour_purity
from genrec_dist.studies.study_data import Pooled
from genrec_dist.studies.study_page import write_study

ROOT = Path(__file__).resolve().parents[2]


def written(study: FakeStudy) -> tuple[str, Page, dict]:
    """Sentence, page and JSON of a study."""
    data = study.data()
    page = STUDIES[study.name].page(data)
    html = Page(write_study(data, page, "configs/fake.yaml"))
    assert "<script" not in html.source
    assert all(link.startswith(("#", "data:image/png")) for link in html.references)
    assert len(html.ids) == len(set(html.ids))
    assert page.verdict.sentence in html.text
    return page.verdict.sentence, html, read_json(data.folder / "study.json")


def rows_of(study: FakeStudy, table: str) -> dict[str, dict[str, str]]:
    with open(study.data().folder / f"{table}.csv", encoding="utf-8", newline="") as file:
        return {next(iter(row.values())): row for row in csv.DictReader(file)}


def main_study(root: Path, own: list[float], other: list[float], half: float = 0.001) -> FakeStudy:
    study = FakeStudy(root, "csj-main", tuple(range(len(own))))
    for name, values in (("csj_id", own), ("semantic_only", other)):
        for seed, value in enumerate(values):
            study.result(study.run(name, seed), value, half)
    return study


def test_ordering_holds_with_intervals_apart(tmp_path):
    study = main_study(tmp_path, [0.06], [0.03], half=0.0005)
    sentence, page, record = written(study)
    assert sentence == (
        "The paper's ordering (CSJ-ID above semantic-only in Recall@1, Recall@5, Recall@10, Recall@20) holds here in "
        "all 4 comparisons, each with non-overlapping 95% intervals."
    )
    assert record["verdict"]["holds"] == "yes"
    assert [c["apart"] for c in record["verdict"]["comparisons"]] == [True] * 4
    assert page.row("improvement")[1:5] == ["+100.0%"] * 4
    assert page.row("CSJ-ID, paper")[1:5] == ["0.0090", "0.0190", "0.0220", "0.0220"]
    assert page.row("improvement, paper")[1:5] == ["+63.6%", "+192.3%", "+144.4%", "+131.6%"]
    assert page.row("CSJ-ID")[3] == "0.06000.0595–0.0605"
    assert "seed 0" in page.text
    assert "22,363 users" in page.text
    assert "order time" in page.text
    table = rows_of(study, "main")
    assert float(table["CSJ-ID"]["recall@10"]) == pytest.approx(0.06)
    assert float(table["CSJ-ID"]["recall@10 low"]) == pytest.approx(0.0595)
    assert table["CSJ-ID, paper"]["ndcg@10"] == ""
    assert table["Semantic-only, paper"]["source"] == "paper"
    ours = record["tables"]["main"][0]
    assert ours["values"]["recall@10"]["seeds"] == {"0": pytest.approx(0.06)}
    assert {run["run"] for run in record["runs"]} == {f"csj-main-fake-{v}-s0" for v in ("csj_id", "semantic_only")}
    assert all(run["commit"] and run["hardware"] for run in record["runs"])


def test_ordering_holds_with_overlap_where_the_intervals_are_wide(tmp_path):
    sentence, _, record = written(main_study(tmp_path, [0.06], [0.05], half=0.004))
    assert sentence.endswith(
        "holds here in all 4 comparisons, but the 95% intervals overlap in Recall@1 of CSJ-ID over Semantic-only, "
        "Recall@5 of CSJ-ID over Semantic-only."
    )
    assert [c["apart"] for c in record["verdict"]["comparisons"]] == [False, False, True, True]


def test_ordering_that_does_not_hold_is_said_plainly(tmp_path):
    sentence, _, record = written(main_study(tmp_path, [0.03], [0.05]))
    assert "does not hold here in any of 4 comparisons: not in Recall@1 (0.0030 for CSJ-ID, 0.0050" in sentence
    assert record["verdict"]["holds"] == "no"


def test_seeds_are_pooled_by_their_widest_bounds(tmp_path):
    study = main_study(tmp_path, [0.06, 0.10], [0.05, 0.062], half=0.0001)  # seed by seed they are apart
    sentence, page, record = written(study)
    assert "but the 95% intervals overlap in every one" in sentence
    assert page.row("CSJ-ID")[3] == "0.0800 ± 0.02830.0599–0.1001"
    seeds = [row for row in page.rows if row[:2] == ["CSJ-ID", "1"]]
    assert seeds[0][4] == "0.10000.0999–0.1001"
    assert record["tables"]["main"][0]["values"]["recall@10"]["intervals"]["1"] == pytest.approx([0.0999, 0.1001])
    assert "lowest lower bound" in page.text


def test_unfinished_study_says_what_is_missing(tmp_path):
    study = FakeStudy(tmp_path, "csj-main", (0, 1))
    study.result(study.run("csj_id"), 0.06)
    sentence, page, record = written(study)
    assert "cannot be said yet: no result of Semantic-only" in sentence
    assert "Not run yet: CSJ-ID, seed 1, Semantic-only, seed 0, Semantic-only, seed 1." in page.text
    assert record["verdict"]["holds"] == "unknown"


def test_reference_above_the_method_is_said(tmp_path):
    study = main_study(tmp_path, [0.06], [0.03])
    strong = {"test": {"recall@10": 0.09}, "intervals": {"recall@10": [0.085, 0.095]}}
    study.result(study.run("csj_id"), 0.06, references={"sasrec_cosine": strong})
    _, page, _ = written(study)
    assert "CSJ-ID's Recall@10 (0.0600) is below that of sasrec cosine (0.0900)" in page.text
    assert page.row("sasrec cosine")[3] == "0.09000.0850–0.0950"


LIKE_PAPER = {"0": (0.5, 0.01, 0.04), "0.3": (0.02, 0.02, 0.03), "0.5": (0.019, 0.03, 0.02), "0.7": (0.018, 0.04, 0.01),
              "1": (0.017, 0.9, 0.001)}  # fmt: skip


def lambda_study(root: Path, losses: dict[str, tuple[float, float, float]], generated: bool = False) -> FakeStudy:
    study = FakeStudy(root, "csj-lambda")
    for place, (weight, values) in enumerate(losses.items()):
        fake = study.run(f"lambda-{weight}")
        study.identifiers(fake, dict(zip(("semantic", "collaborative", "total"), values, strict=True)))
        if generated:
            study.result(fake, 0.05 - 0.01 * abs(place - 1))
    return study


def test_losses_by_lambda(tmp_path):
    study = lambda_study(tmp_path, LIKE_PAPER)
    sentence, page, record = written(study)
    assert sentence == (
        "The paper's ordering (with λ the semantic loss falls, the collaborative loss rises and the total falls) holds "
        "here in all 11 comparisons."  # 4 neighbours x 3 losses, less one tie of the printed semantic losses
    )
    assert page.row("0.3")[1:] == ["0.02", "0.0022", "0.02", "0.0241", "0.03", "0.0281"]
    assert "Recall@10 is highest" not in page.text
    assert record["tables"]["lambda"][0]["values"]["paper collaborative"] == 0.0212
    assert float(rows_of(study, "lambda")["0.7"]["total"]) == 0.01


def test_lambda_with_a_generator_names_the_best_recall(tmp_path):
    study = lambda_study(tmp_path, LIKE_PAPER | {"0.5": (0.019, 0.05, 0.02)}, generated=True)
    sentence, page, _ = written(study)
    assert (
        "holds only in part: in 10 of 11 comparisons, not in collaborative loss (0.04 for λ = 0.7, 0.05 for" in sentence
    )
    assert "Recall@10 is highest at λ = 0.3 (0.0500)" in page.text


def test_uniqueness_of_codes(tmp_path):
    study = FakeStudy(tmp_path, "csj-unique")
    study.identifiers(study.run("csj_id"), unique=11400)
    study.identifiers(study.run("semantic_only"), unique=11700)
    sentence, page, _ = written(study)
    assert "does not hold here: not in coverage (95.00% for CSJ-ID, 97.50% for Semantic-only)" in sentence
    assert page.row("CSJ-ID")[1:] == ["12,000", "11,400", "95.00%", "600", "100.00%"]
    assert page.row("CSJ-ID, paper")[2:4] == ["12,000", "99.20%"]


def planted(groups: np.ndarray, dim: int = 8) -> np.ndarray:
    """Vectors around a far centre for each group."""
    rng = np.random.default_rng(0)
    return (20 * np.eye(dim)[groups % dim] + rng.normal(size=(len(groups), dim))).astype(np.float32)


@pytest.mark.parametrize("follows_behaviour", [False, True])
def test_maps_judge_the_claim_by_neighbours(tmp_path, follows_behaviour):
    content, behaviour = np.arange(480) // 120, np.arange(480) % 8  # 15 items of each pair
    study = FakeStudy(tmp_path, "csj-tsne")
    names = [[f"Shop > Part {group} > Leaf"] for group in content]

    def catalog(out: Path) -> None:
        pq.write_table(pa.table({"categories": names}), out / "items.parquet")

    own = np.hstack([planted(content), planted(behaviour)])
    for variant, table in (("csj_id", own), ("semantic_only", own if follows_behaviour else planted(content))):
        fake = study.run(variant)
        fake.add("catalog", catalog)
        fake.add("lightgcn", lambda out: write_embeddings(out, planted(behaviour)))
        fake.add("identifiers", lambda out, table=table: write_embeddings(out, table))
    sentence, page, record = written(study)
    if follows_behaviour:
        assert "holds only in part" in sentence
        assert sentence.endswith("semantic-only codes follow behaviour too, and no less than CSJ-ID's.")
    else:
        assert ") holds here; near neighbours of one label: CSJ-ID 100.0% by content" in sentence
    assert page.tags.count("svg") == 2
    assert page.text.count("by chance") >= 4
    assert record["tables"]["purity"][0]["values"]["content"]["mean"] == 1.0
    assert all(label in page.text for label in ("Part 0", "Part 3", "cluster 1", "cluster 8"))


def test_maps_without_codes_say_so(tmp_path):
    study = FakeStudy(tmp_path, "csj-tsne")
    study.run("csj_id")
    sentence, page, _ = written(study)
    assert "cannot be said yet" in sentence
    assert "svg" not in page.tags


@pytest.mark.parametrize("name", ["tokenizers", "csj-tokenizers"])
def test_tokenizers(tmp_path, name):
    study = FakeStudy(tmp_path, name)
    for variant, recall in (("hierarchical_kmeans", 0.06), ("rqvae", 0.04), ("random", 0.065)):
        fake = study.run(variant)
        study.result(fake, recall)
        study.identifiers(fake, unique=9000)
    sentence, page, _ = written(study)
    assert (
        "holds only in part: in 2 of 4 comparisons, not in Recall@20 (0.1200 for hierarchical k-means, 0.1300"
        in sentence
    )
    assert sentence.startswith("The paper's ordering" if name == "tokenizers" else "The ordering of PRORec's Figure 8")
    assert page.row("RQ-VAE")[5:] == ["75.00%", "4.25"]
    assert page.row("PRORec, paper" if name == "tokenizers" else "CSJ-ID, paper (RQ-VAE)")


def test_number_of_clusters(tmp_path):
    study = FakeStudy(tmp_path, "clusters")
    for variant, recall in (("k128", 0.05), ("k256", 0.06), ("k512", 0.055)):
        study.result(study.run(variant), recall)
    sentence, page, record = written(study)
    assert "in 3 of 4 comparisons, not in NDCG@20 (0.0550 for K = 512, 0.0600 for K = 256" in sentence
    assert page.row("K = 256, paper")[1:5] == ["0.0939", "0.1289", "0.0559", "0.0646"]
    assert list(record["variants"]) == ["k128", "k256", "k512"]


def test_pooled_number():
    assert Pooled({0: 1.0, 1: 3.0}).mean == 2.0
    assert Pooled({0: 1.0, 1: 3.0}).spread == (1.0, 3.0)
    assert Pooled({0: 1.0}).spread is None
    assert Pooled({0: 1.0, 1: 3.0}, {0: (0.5, 2.0), 1: (1.5, 3.5)}).spread == (0.5, 3.5)


def test_purity_by_hand():
    table = np.array([[0.0], [1.0], [10.0], [11.0]], np.float32)
    found = neighbour_purity(table, np.array([0, 0, 1, -1]))  # 3 neighbours each: everyone else
    assert found["purity"] == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)
    assert (found["neighbours"], found["queries"]) == (3, 3)
    assert neighbour_purity(table, np.full(4, -1))["purity"] is None


def test_content_labels_skip_a_level_that_tells_nothing(tmp_path):
    paths = [["Shop > A > x"], ["Shop > A > y"], ["Shop > B"], ["Shop > C > z", "Other"], []]
    pq.write_table(pa.table({"categories": paths}), tmp_path / "items.parquet")
    labels = content_labels(tmp_path, 2)
    assert labels.names == ["A", "B"]
    assert labels.values.tolist() == [0, 0, 1, -1, -1]


def test_behaviour_labels_are_clusters_of_directions(tmp_path):
    table = np.array([[1, 0], [5, 0], [0, 1], [0, 3], [0, 2]], np.float32)
    write_embeddings(tmp_path, table)
    assert behaviour_labels(tmp_path, 0, 2).values.tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("name", list(STUDIES))
def test_every_study_can_be_run_on_every_data_set(name):
    study = STUDIES[name]
    assert len({v.name for v in study.variants}) == len(study.variants)
    for data_set in paper.DATA_SETS:
        file = ROOT / "configs" / f"{study.family}_{data_set}.yaml"
        for variant in study.variants:
            assert {parse_override(text)[0] for text in variant.overrides} <= set(known_keys())
            resolved = load_config(file, [*variant.overrides, f"name={name}-{file.stem}-{variant.name}-s0"])
            assert resolved.catalog.path == data_set


def test_unknown_study_names_the_nearest():
    with pytest.raises(ConfigError, match="nearest: csj-lambda"):
        find_study("csj-lamda")


def test_numbers_of_the_csj_paper_are_consistent():
    own, other = paper.CSJ_MAIN["csj_id"], paper.CSJ_MAIN["semantic_only"]
    for name, gain in paper.CSJ_IMPROVEMENT.items():
        assert own[name] / other[name] - 1 == pytest.approx(gain, abs=6e-4)
    items = paper.CSJ_STATISTICS["beauty"]["items"]
    for row in paper.CSJ_UNIQUE.values():
        assert row["unique_codes"] / items == pytest.approx(row["coverage"], abs=1e-3)
    for weight, row in paper.CSJ_LAMBDA.items():
        assert row["total"] > weight * row["semantic"] + (1 - weight) * row["collaborative"]
    users, interactions = paper.CSJ_STATISTICS["beauty"]["users"], paper.CSJ_STATISTICS["beauty"]["interactions"]
    assert interactions / users / items == pytest.approx(0.00073, abs=1e-5)
