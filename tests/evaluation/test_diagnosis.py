"""Where recall is lost: ranks of prefixes against sums of exact probabilities, and the command on a finished run."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from genrec_dist.artifacts.files import write_json
from genrec_dist.collaborative.stage import load_fusion
from genrec_dist.config import Config, FusionConfig, RuntimeConfig
from genrec_dist.evaluation.dense import by_history, dense_ranks
from genrec_dist.evaluation.diagnosis import diagnose
from genrec_dist.evaluation.generative import GenerativeRanker
from genrec_dist.evaluation.metrics import rank_metrics
from genrec_dist.evaluation.ranking import rank_users
from genrec_dist.generator.beam import exact_log_probabilities, node_log_probabilities
from genrec_dist.methods import build_stages, collect_metrics
from genrec_dist.runs import RunFolder
from genrec_dist.testing.tiny import (
    tiny_embeddings,
    tiny_generator,
    tiny_gpt,
    tiny_histories,
    tiny_sequences,
    tiny_trie,
)
from genrec_dist.testing.tiny_runs import tiny_run
from genrec_dist.training.samples import holdout_samples
from genrec_dist.training.worker import Worker
from launcher.cli import app

torch.set_num_threads(1)
NUM_ITEMS = 40
TRIE = tiny_trie(NUM_ITEMS, 4, seed=1)  # leaves at several depths
SEQUENCES = tiny_sequences(30, NUM_ITEMS, shortest=3)
CUTOFFS = [1, 3, 10]
MODELS = {
    "child": lambda: tiny_generator(TRIE, seed=3),
    "token_first": lambda: tiny_generator(TRIE, seed=3, distill_position="start"),
    "per_level": lambda: tiny_generator(TRIE, seed=3, encoder_input="codes", head="per_level", distill_weight=0.0),
    "gpt": lambda: tiny_gpt(TRIE, seed=3),
}


def code_words() -> list[tuple[int, ...]]:
    """The nodes of each item's codes, as long as its codes are."""
    return [tuple(TRIE.item_path[i, : TRIE.depth[i]].tolist()) for i in range(NUM_ITEMS)]


def rank(values: dict, own) -> int:
    """1 + those that are better than one's own."""
    return 1 + sum(value > values[own] for value in values.values())


def reference(p: np.ndarray, target: int, level: int) -> tuple[int, int, int]:
    """Ranks of the target's prefix, of its code behind its own prefix, and of the target behind its prefix."""
    words = code_words()
    prefixes: dict[tuple, float] = defaultdict(float)
    for item, word in enumerate(words):
        prefixes[word[:level]] += p[item]
    own, before = words[target][:level], words[target][: level - 1]
    siblings = {prefix: value for prefix, value in prefixes.items() if prefix[: level - 1] == before}
    items = {item: p[item] for item, word in enumerate(words) if word[:level] == own}
    return rank(prefixes, own), rank(siblings, own), rank(items, target)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_prefix_is_as_likely_as_what_lies_behind_it(model):
    made = model()
    history = tiny_histories(8, NUM_ITEMS, 6)
    p = node_log_probabilities(made, *history).exp()
    torch.testing.assert_close(p[:, 0], torch.ones(8))
    for node in np.flatnonzero(TRIE.num_children):
        below = np.flatnonzero(TRIE.parent == node)
        below = below[below != node]
        torch.testing.assert_close(p[:, below].sum(1), p[:, node])


@pytest.mark.parametrize("split", ["test", "valid"])
@pytest.mark.parametrize("name", MODELS)
def test_levels_are_the_sums_of_the_items_probabilities(name, split):
    model = MODELS[name]()
    users = np.flatnonzero(SEQUENCES.lengths >= 3)[::2]
    found = diagnose(GenerativeRanker(model, 20, 0.3), {}, SEQUENCES, users, split, CUTOFFS)
    samples, _ = holdout_samples(SEQUENCES, model.max_history, split, torch.device("cpu"), users=users)
    batch = samples.gather(torch.arange(len(users)), model.max_history)
    p = exact_log_probabilities(model, batch["history"], batch["mask"]).double().exp().numpy()
    targets = batch["target"].tolist()
    assert [level["level"] for level in found["levels"]] == list(range(1, TRIE.max_depth + 1))
    for level in found["levels"]:
        ranks = np.array([reference(p[row], target, level["level"]) for row, target in enumerate(targets)])
        assert level["nodes"] == len({word[: level["level"]] for word in code_words()})
        for kind, column in (("prefix", 0), ("code", 1), ("items", 2)):
            assert level[kind] == rank_metrics(ranks[:, column], CUTOFFS), (level["level"], kind)
    last = found["levels"][-1]
    assert last["items"]["recall@1"] == 1.0  # all codes given: the item itself
    assert last["prefix"] == found["rankings"]["exact"]
    names = {"beam", "exact"} | ({"beam_of_codes"} if name in ("child", "token_first") else set())
    assert set(found["rankings"]) == names | ({"token"} if name == "token_first" else set())


def test_a_beam_as_wide_as_the_catalog_loses_nothing():
    model = MODELS["gpt"]()
    users = np.flatnonzero(SEQUENCES.lengths >= 3)
    rankings = diagnose(GenerativeRanker(model, NUM_ITEMS, 0.0), {}, SEQUENCES, users, "test", CUTOFFS)["rankings"]
    assert rankings["beam"] == rankings["exact"]
    narrow = diagnose(GenerativeRanker(model, 10, 0.0), {}, SEQUENCES, users, "test", [1, 3, 10])["rankings"]
    assert narrow["exact"] == rankings["exact"]
    assert narrow["beam"] != narrow["exact"]


@pytest.mark.parametrize("mode", ["joint", "collaborative"])
def test_the_command_adds_stage_one(tmp_path, mode):
    fusion = FusionConfig(dim=4, max_history=9, mode=mode, backbone="sasrec", time_bumps=4, integrated="sum")
    run = tiny_run(tmp_path, "small", TRIE, "prorec", fusion)
    done = CliRunner().invoke(app, ["diagnose", str(run.path), "--users", "0", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["split"] == "test"
    assert found["users"] == 30
    stage_one = load_fusion(fusion, tiny_embeddings(NUM_ITEMS, seed=4), run.artifact("fusion"))
    sequences = tiny_sequences(30, NUM_ITEMS, shortest=4)
    samples, _ = holdout_samples(sequences, 9, "test", torch.device("cpu"), times=True)
    ranks = dense_ranks(by_history(stage_one.score_catalog), samples, 9, Worker())
    expected = rank_metrics(ranks, [1, 5, 10, 20])
    assert found["rankings"]["stage_one"] == expected
    shown = CliRunner().invoke(app, ["diagnose", str(run.path), "--users", "7", "--split", "valid"])
    assert shown.exit_code == 0, shown.output
    assert "7 users, valid items, beam 20" in shown.output
    assert "Stage I, all items" in shown.output
    assert "Recall@10 behind it" in shown.output
    assert "distillation token, all items" not in shown.output  # it stands at the end


def test_stage_one_is_evaluated_as_a_reference(tmp_path):
    fusion = FusionConfig(dim=4, max_history=9, backbone="sasrec", time_bumps=4, integrated="sum")
    run = tiny_run(tmp_path, "small", TRIE, "prorec", fusion)
    config = run.config().model_copy(update={"references": ["stage_one"]})
    stage = next(stage for stage in build_stages(config) if stage.title == "evaluation stage_one")
    inputs = {role: run.artifact(role) for role in stage.inputs}
    assert set(inputs) == {"catalog", "semantic", "fusion"}
    ranks = rank_users(Worker(), inputs, stage.settings, RuntimeConfig(backend="local"))
    stage_one = load_fusion(fusion, tiny_embeddings(NUM_ITEMS, seed=4), inputs["fusion"])
    for split in ("test", "valid"):
        samples, _ = holdout_samples(
            tiny_sequences(30, NUM_ITEMS, shortest=4), 9, split, torch.device("cpu"), times=True
        )
        expected = dense_ranks(by_history(stage_one.score_catalog), samples, 9, Worker())
        assert ranks[split]["rank"].tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 5


def test_stage_one_is_a_reference_of_prorec_only():
    with pytest.raises(ValidationError, match="stage_one"):
        Config(method="csj_id", references=["stage_one"])
    text_alone = Config(method="prorec", references=["popularity", "stage_one"], fusion=FusionConfig(mode="semantic"))
    assert text_alone.active_references == ["popularity"]


@pytest.mark.parametrize(("mode", "expected"), [("joint", ["popularity", "stage_one"]), ("semantic", ["popularity"])])
def test_metrics_are_collected_of_the_references_that_a_run_has(tmp_path, mode, expected):
    config = Config(method="prorec", references=["popularity", "stage_one"], fusion=FusionConfig(mode=mode))
    run = RunFolder(tmp_path, "one")
    run.create(config, [])
    for place, stage in enumerate(stage for stage in build_stages(config) if stage.name == "evaluation"):
        folder = tmp_path / "store" / str(place)
        write_json(folder / "metrics.json", {"title": stage.title})
        run.link(stage.title, stage.name, str(place), folder)
    found = collect_metrics(config, run)
    assert found["main"] == {"title": "evaluation"}
    assert found["references"] == {name: {"title": f"evaluation {name}"} for name in expected}


def test_a_run_without_a_generator_is_refused(tmp_path):
    run = tiny_run(tmp_path, "small", TRIE, "csj_id")
    done = CliRunner().invoke(app, ["diagnose", str(run.path), "--users", "5"])
    assert done.exit_code == 0, done.output
    assert "Stage I" not in done.output
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("method: csj_id", "method: sasrec"))
    refused = CliRunner().invoke(app, ["diagnose", str(run.path)])
    assert refused.exit_code == 2
    assert "run has no generator" in refused.output
