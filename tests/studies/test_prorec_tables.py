"""Pages of PRORec's Tables 3 to 6 and Figure 7, and the one page of several, from made-up runs."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from fake_study import FakeStudy
from test_report import Page
from test_study_pages import rows_of, written

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.studies.catalogue import PAPERS, STUDIES
from genrec_dist.studies.recipes import find_recipe
from genrec_dist.studies.reproduction import Part, write_reproduction


def scored(recall: float, half: float = 0.0005) -> dict:
    """An evaluation with Recall@10 as given, the others in proportion."""
    test = {"recall@10": recall, "recall@20": 1.4 * recall, "ndcg@10": 0.6 * recall, "ndcg@20": 0.7 * recall}
    return {"test": test, "intervals": {k: [v - half, v + half] for k, v in test.items()}, "users": 22363}


def performance(root: Path, own: list[float], rival: float, mixed: bool = False) -> FakeStudy:
    study = FakeStudy(root, "performance", tuple(range(len(own))))
    for seed, recall in enumerate(own):
        extra = {"without_mix": {name: 0.9 * v for name, v in scored(recall)["test"].items()}} if mixed else {}
        references = {"popularity": scored(0.01), "sasrec_cosine": scored(rival)}
        study.run("prorec", seed).summary(scored(recall) | extra, references)
    return study


def test_performance_beside_every_printed_method(tmp_path):
    study = performance(tmp_path, [0.08, 0.09], rival=0.07, mixed=True)
    sentence, page, record = written(study)
    assert sentence.startswith("The paper's ordering (PRORec above sasrec cosine) holds here in all 4 comparisons")
    assert "non-overlapping 95% intervals" in sentence
    assert page.row("PRORec")[1] == "0.0850 ± 0.00710.0795–0.0905"
    assert page.row("PRORec, beam alone")[1].startswith("0.0765 ± 0.0064")
    assert page.row("PRORec against the paper")[1] == "-9.5%"  # .085 of the printed .0939
    assert page.row("EAGER, paper")[1:] == ["0.0836", "0.1124", "0.0525", "0.0599"]
    assert record["tables"]["performance"][0]["values"]["recall@10"]["deviation"] == pytest.approx(0.00707, abs=1e-5)
    row = rows_of(study, "performance")["PRORec"]
    assert float(row["recall@10 deviation"]) == pytest.approx(0.00707, abs=1e-5)
    assert float(row["recall@10 low"]) == pytest.approx(0.0795)


def test_a_stronger_reference_is_said(tmp_path):
    sentence, _, record = written(performance(tmp_path, [0.08], rival=0.09))
    assert "does not hold here in any of 4 comparisons: not in Recall@10 (0.0800 for PRORec, 0.0900 for" in sentence
    assert record["verdict"]["holds"] == "no"


def similarity(root: Path, concat: float, ours: float) -> FakeStudy:
    study = FakeStudy(root, "similarity")
    for variant, mode, share in (("concat", "concat_pca", concat), ("ours", "ours", ours)):
        found = {"semantic": share, "collaborative": 1 - share, "kl_semantic": 0.1, "kl_collaborative": 0.2}
        tables = {mode: found, "concat": dict.fromkeys(found, 0.5)}  # the second is of the same run, not of the variant
        study.run(variant).add("fusion", lambda out, tables=tables: write_json(out / "similarity.json", tables))
    return study


@pytest.mark.parametrize(
    ("concat", "ours", "said"),
    [
        (0.9, 0.6, "holds here in all 2 comparisons"),
        (0.7, 0.8, "holds only in part: in 1 of 2 comparisons, not in similarity to the semantic modality (70.00%"),
        (0.2, 0.4, "does not hold here in any of 2 comparisons: not in similarity of concat (20.00% for the semantic"),
    ],
)
def test_similarity_of_the_modalities(tmp_path, concat, ours, said):
    sentence, page, _ = written(similarity(tmp_path, concat, ours))
    assert said in sentence
    assert page.row("Concat")[1:3] == [f"{concat:.2%}", f"{1 - concat:.2%}"]
    assert page.row("Concat, paper")[1:3] == ["97.33%", "2.67%"]


def ablation(root: Path, name: str, recalls: dict[str, float], alone: dict[str, float] | None = None) -> FakeStudy:
    """Runs of variants; `alone`: Recall@10 of the beam without the token's score, of those that mix it in."""
    study = FakeStudy(root, name)
    for variant, recall in recalls.items():
        extra = {"without_mix": scored(alone[variant])["test"]} if variant in (alone or {}) else {}
        study.run(variant).summary(scored(recall) | extra, {})
    return study


def with_settings(study: FakeStudy, old: str, new: str) -> FakeStudy:
    for data in study.runs.values():
        text = (data.run.path / "config.yaml").read_text()
        assert old in text
        (data.run.path / "config.yaml").write_text(text.replace(old, new))
    return study


def test_modalities(tmp_path):
    recalls = {"semantic": 0.07, "collaborative": 0.072, "concat": 0.071, "ours": 0.08}
    sentence, page, _ = written(ablation(tmp_path, "modalities", recalls))
    assert "in 12 of 14 comparisons, not in Recall@10 (0.0700 for Semantic only, 0.0710 for Concat" in sentence
    assert page.row("Semantic only, paper")[1] == "0.0810"
    assert "PRORec +14.3% over Semantic only (0.0800 against 0.0700)" in page.text


def test_tasks(tmp_path):
    recalls = {"neither": 0.071, "alignment": 0.075, "both": 0.08, "distillation": 0.079}
    sentence, page, _ = written(ablation(tmp_path, "tasks", recalls))
    assert "holds here in all 8 comparisons" in sentence
    assert page.row("Alignment, paper")[1:] == ["0.0827", "0.1122", "0.0509", "0.0583"]
    assert page.row("Distillation alone")[1].startswith("0.0790")
    assert "Distillation alone, paper" not in page.text


def test_ablations_compare_beams_alone(tmp_path):
    """Only variants with a token can mix its score in: that they gain by it says nothing of the task."""
    recalls = {"neither": 0.071, "alignment": 0.075, "both": 0.08, "distillation": 0.079}
    sentence, page, _ = written(ablation(tmp_path, "tasks", recalls, {"both": 0.074, "distillation": 0.073}))
    assert "holds only in part: in 4 of 8 comparisons" in sentence
    assert "0.0740 for Alignment and distillation, 0.0750 for Alignment" in sentence
    assert page.row("Alignment and distillation, beam alone")[1].startswith("0.0740")
    assert "Alignment and distillation -1.3% over Alignment (0.0740 against 0.0750)" in page.text


def test_stage_one_stands_beside_the_run_that_it_is_of(tmp_path):
    alone = performance(tmp_path / "a", [0.08], rival=0.07)
    for fake in (alone, ablation(tmp_path / "b", "tasks", {"neither": 0.071, "both": 0.08})):
        for data in fake.runs.values():
            main = read_json(data.run.path / "metrics.json")
            main["references"] |= {"stage_one": scored(0.09)}
            write_json(data.run.path / "metrics.json", main)
        _, page, _ = written(fake)
        assert ("stage one" in page.text) == (fake is alone)


def test_what_prorec_has_and_sasrec_has_not_is_said(tmp_path):
    assert "SASRec has not" not in written(performance(tmp_path / "a", [0.08], rival=0.07))[1].text
    with_times = with_settings(performance(tmp_path / "b", [0.08], rival=0.07), "time_bumps: 0", "time_bumps: 8")
    said = written(with_times)[1].text
    assert "PRORec has, and SASRec has not: the times of a user's history" in said


@pytest.mark.parametrize(("data_set", "printed"), [("beauty", "0.0939"), ("toys", "0.0822"), ("other", None)])
def test_a_printed_row_is_that_of_the_data_set(tmp_path, data_set, printed):
    study = ablation(tmp_path, "tokenizers", {"hierarchical_kmeans": 0.08})
    _, page, _ = written(with_settings(study, "path: beauty", f"path: {data_set}"))
    if printed:
        assert page.row("PRORec, paper")[1] == printed
    else:
        assert "PRORec, paper" not in page.text


def test_ablations_of_another_data_set_stand_without_the_papers_rows(tmp_path):
    study = ablation(tmp_path, "tasks", {"neither": 0.03})
    run = study.runs["neither", 0].run
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("path: beauty", "path: toys"))
    sentence, page, record = written(study)
    assert "cannot be said yet" in sentence
    assert "Neither task, paper" not in page.text
    assert "Beauty, not this data set" in page.text
    assert record["missing"] == [f"{v.label}, seed 0" for v in STUDIES["tasks"].variants[1:]]


def test_encoders_that_are_not_here_are_named_and_not_made_up(tmp_path):
    study = FakeStudy(tmp_path, "encoders")
    fake = study.run("minilm")
    fake.summary(scored(0.08), {})
    fake.add("semantic", lambda out: write_json(out / "report.json", {"dim": 384}))
    absent = {name: f"the weights of {name} are not on this machine" for name in ("llama2-7b", "sentence-t5", "bert")}
    data = study.data()
    data.absent.update(absent)
    study.data = lambda: data
    sentence, page, record = written(study)
    assert sentence.endswith("holds cannot be said yet: no result of BERT, Llama2-7b, Sentence-T5.")
    assert page.row("MiniLM")[1] == "0.08000.0795–0.0805"
    assert page.row("MiniLM")[-1] == "384"
    assert "Not run here: Llama2-7b. the weights of llama2-7b" in page.text
    assert record["missing"][0] == "Llama2-7b (the weights of llama2-7b are not on this machine)"


def test_a_run_that_failed_is_named_as_one_without_result(tmp_path):
    study = ablation(tmp_path, "tasks", {"neither": 0.07})
    study.run("alignment")
    _, page, record = written(study)
    assert record["missing"][0] == "Alignment, seed 0 (started, no result)"
    assert "Alignment, seed 0 (started, no result)" in page.text


def test_one_page_of_several_tables(tmp_path):
    first, second = performance(tmp_path / "a", [0.08, 0.09], 0.07), performance(tmp_path / "b", [0.1, 0.1], 0.11)
    tasks = ablation(tmp_path / "c", "tasks", {"neither": 0.071, "alignment": 0.075, "both": 0.08})
    parts = []
    for title, order, study in (("Table 3", "time", first), ("Table 3", "file", second), ("Table 6", "time", tasks)):
        data = study.data()
        page = STUDIES[study.name].page(data)
        parts.append(Part(title, "beauty", order, data, page, find_recipe("beauty", order)))
    folder = tmp_path / "reproduce-prorec"
    page = Page(write_reproduction(folder, "prorec", parts, ["genrec", "reproduce", "prorec"]))
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(
        r'(href="|url\()#(?!table-|runs|verdicts)', page.source
    )  # references of a figure follow its ids
    assert page.row("Beauty, order time")[1].startswith("0.0850 ± 0.0071")
    assert page.row("against the paper")[1] == "-9.5%"
    for part in parts:
        assert part.page.verdict.sentence in page.text
        assert part.heading in page.text
    assert "Table 6 · Beauty · order time: Distillation alone, seed 0" in page.text
    record = read_json(folder / "reproduce.json")
    assert [(part["item"], part["order"], part["verdict"]["holds"]) for part in record["parts"]] == [
        ("Table 3", "time", "yes"),
        ("Table 3", "file", "no"),
        ("Table 6", "time", "yes"),
    ]
    assert record["command"] == ["genrec", "reproduce", "prorec"]
    with open(folder / "table-6-beauty-time-tasks.csv", encoding="utf-8", newline="") as file:
        assert next(csv.reader(file))[:3] == ["row", "source", "recall@10"]
    assert (folder / "table-3.csv").is_file()


def test_every_table_and_figure_has_its_study():
    assert {name for studies in PAPERS.values() for name in studies.values()} <= set(STUDIES)
