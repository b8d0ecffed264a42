"""The decoder-only generator as a stage: training leaves an artifact that loads, ranks and recommends."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.config import Config, EvaluationConfig, GptConfig, RuntimeConfig
from genrec_dist.errors import ArtifactError, ConfigError
from genrec_dist.evaluation.ranking import rank_users
from genrec_dist.evaluation.stage import evaluation_stage, summarise
from genrec_dist.generator.gpt import GptGenerator
from genrec_dist.generator.gpt_stage import build_gpt, gpt_stage, load_gpt
from genrec_dist.generator.recommend import recommend
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.runs import RunFolder
from genrec_dist.testing.tiny import tiny_embeddings, tiny_gpt, tiny_sequences, tiny_trie, write_tiny_catalog
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)
NUM_ITEMS = 25
TRIE = tiny_trie(NUM_ITEMS, 4, seed=1)
SECTION = tiny_gpt(TRIE, head="child").config
EVALUATION = EvaluationConfig(beam_width=20, exact_users=20, bootstrap_samples=10, mix_weight=0.3)
CONFIG = Config(method="csj_id", gpt=SECTION, evaluation=EVALUATION, references=[])
RUNTIME = RuntimeConfig(backend="local", num_threads=1, device="cpu", checkpoint_minutes=0.0, eval_batch_size=7)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Catalog, codebook with a table and the trained generator on disk."""
    root = tmp_path_factory.mktemp("gpt")
    folders = {name: root / name for name in ("catalog", "identifiers", "generator")}
    for folder in folders.values():
        folder.mkdir()
    write_tiny_catalog(folders["catalog"], tiny_sequences(30, NUM_ITEMS, shortest=4))
    write_embeddings(folders["identifiers"], tiny_embeddings(NUM_ITEMS))
    TRIE.save(folders["identifiers"])
    given = {name: folders[name] for name in ("catalog", "identifiers")}
    stage = gpt_stage(CONFIG, leaf("catalog"), leaf("identifiers"))
    stage.build(StageContext(folders["generator"], given, RUNTIME, key="tiny", title="gpt"))
    return folders


def leaf(name: str) -> Stage:
    return Stage(name, 1, {}, {}, lambda context: None)


def test_the_stage_and_its_settings():
    stage = gpt_stage(CONFIG, leaf("catalog"), leaf("identifiers"))
    assert (stage.name, stage.version) == ("gpt", 2)
    assert set(stage.settings) == {"gpt", "order", "seed", "validation_users", "validation_beam"}
    assert set(stage.inputs) == {"catalog", "identifiers"}


def test_training_leaves_an_artifact_that_loads(inputs):
    model = load_gpt(SECTION, inputs["identifiers"], inputs["generator"])
    stored = load_file(inputs["generator"] / "model.safetensors")
    assert all(torch.equal(stored[name], parameter) for name, parameter in model.named_parameters())
    assert not model.training
    summary, curves = (
        read_json(inputs["generator"] / "summary.json"),
        read_jsonl(inputs["generator"] / "curves.jsonl"),
    )
    valid = [line["ndcg@10"] for line in curves if line["split"] == "valid"]
    assert summary["best_valid_ndcg@10"] == max(valid)
    for line in curves:
        if line["split"] == "train":
            levels = [line[f"loss_level_{level}"] for level in range(1, TRIE.max_depth + 1)]
            assert sum(levels) == pytest.approx(line["loss"], rel=1e-5)


def test_evaluation_ranks_the_lists_of_the_generator(inputs):
    stage = evaluation_stage(CONFIG, "gpt", {name: leaf(name) for name in inputs}, "evaluation")
    assert stage.settings["gpt"] == SECTION.model_dump(mode="json")
    shares = [rank_users(Worker(rank, 2), inputs, stage.settings, RUNTIME)["test"] for rank in range(2)]
    alone = rank_users(Worker(), inputs, stage.settings, RUNTIME)["test"]
    assert set(alone) == {"rank", "rank_masked", "rank_exact", "rank_checked", "same_top10"}
    for name, values in alone.items():
        assert (sum(share[name] for share in shares) == values).all(), name
    assert (alone["rank_exact"][:20] > 0).all()
    found = alone["rank_checked"][:20] > 0
    assert found.any()
    assert (alone["rank"][:20] == alone["rank_checked"][:20]).all()
    assert (alone["same_top10"][:20] >= 9).all()
    summary = summarise(alone, alone, alone["rank"] < 0, stage.settings, EVALUATION)
    assert (summary["beam_width"], summary["mix_weight"], summary["exact"]["users"]) == (20, 0.0, 20)


@pytest.mark.parametrize("method", ["csj_id", "semantic_id"])
def test_recommendations_of_a_run(inputs, tmp_path, method):
    run = RunFolder(tmp_path, "tiny")
    run.create(CONFIG.model_copy(update={"method": method}), [])
    for title, name in (("catalog", "catalog"), ("identifiers", "identifiers"), ("gpt", "generator")):
        run.link(title, title, "key", inputs[name])
    history = [f"item-{i}" for i in range(9)]  # longer than max_history
    ranked = recommend(run, history, 5, "cpu")
    assert len(ranked) == 5
    assert not {row["item_id"] for row in ranked} & set(history)
    assert [row["score"] for row in ranked] == sorted((row["score"] for row in ranked), reverse=True)


def test_no_recommendations_from_a_method_without_codes(tmp_path):
    run = RunFolder(tmp_path, "tiny")
    run.create(Config(method="sasrec"), [])
    with pytest.raises(ConfigError, match="prorec, csj_id, semantic_id"):
        recommend(run, ["item-1"], 5, "cpu")


def test_the_child_head_needs_a_table(tmp_path):
    TRIE.save(tmp_path)
    with pytest.raises(ConfigError, match=r"gpt.head=per_level"):
        build_gpt(SECTION, tmp_path)
    with pytest.raises(ValueError, match="got no table"):
        GptGenerator(SECTION, TRIE)
    with pytest.raises(ValueError, match="table of 3 items"):
        GptGenerator(SECTION, TRIE, torch.zeros(3, 6))
    assert build_gpt(SECTION.model_copy(update={"head": "per_level"}), tmp_path).head.levels


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": 1}, "unexpected"),
        ({"num_layers": 3}, "missing"),
        ({"dim": 16}, "of other shapes"),
        ({"head": "per_level"}, "head.levels.0"),
    ],
)
def test_parameters_of_another_model_are_refused(inputs, change, named):
    other = GptConfig.model_validate(SECTION.model_dump() | change)
    with pytest.raises(ArtifactError, match=named) as caught:
        load_gpt(other, inputs["identifiers"], inputs["generator"])
    assert "gpt section" in caught.value.expected


def test_a_damaged_artifact_is_refused(inputs, tmp_path):
    stored = load_file(inputs["generator"] / "model.safetensors")
    del stored["bos"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="bos"):
        load_gpt(SECTION, inputs["identifiers"], tmp_path)
