"""Launching worker functions: typed errors travel, the plain backend, and (slow) Ray Train with two workers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genrec_dist import errors
from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.config import GeneratorConfig, RuntimeConfig
from genrec_dist.errors import ClusterError, DataError, GenrecError, TrainingError
from genrec_dist.evaluation.generative import list_ranks
from genrec_dist.generator.stage import load_model, train_generator
from genrec_dist.pipeline import StageContext
from genrec_dist.testing.faults import exit_once, raise_data_error
from genrec_dist.testing.tiny import tiny_embeddings, tiny_generator, tiny_sequences, tiny_trie, write_tiny_catalog
from genrec_dist.training.attempts import describe_error, rebuild_error
from genrec_dist.training.launch import launch
from genrec_dist.training.samples import holdout_samples
from genrec_dist.training.worker import Worker, pick_device, plain_worker

torch.set_num_threads(1)
TYPED = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GenrecError)]


@pytest.mark.parametrize("kind", TYPED)
def test_typed_errors_survive_the_trip(kind):
    error = kind("broke", where="a.b", got="3 rows", expected="4 rows", fix="add one")
    for back in (rebuild_error(describe_error(error)), pickle.loads(pickle.dumps(error))):
        assert type(back) is kind
        assert vars(back) == vars(error)
        assert str(back) == str(error)
        assert back.exit_code == kind.exit_code


def test_fields_left_out_stay_out_and_others_become_text():
    back = rebuild_error(describe_error(DataError("broke", got=[1, 2])))
    assert (back.where, back.expected, back.fix) == (None, None, None)
    assert back.got == "[1, 2]"


def make_context(folder, inputs=None, **runtime) -> StageContext:
    folder.mkdir(exist_ok=True)
    settings = {"num_threads": 1, "device": "cpu", "checkpoint_minutes": 0.0} | runtime
    return StageContext(folder, inputs or {}, RuntimeConfig(**settings), key="tiny", title="tiny")


def test_the_plain_backend_calls_the_function_here(tmp_path):
    with pytest.raises(DataError, match="made to fail") as caught:
        launch(raise_data_error, make_context(tmp_path, backend="local"), {"rank": 0})
    assert caught.value.got == 0
    launch(raise_data_error, make_context(tmp_path, backend="local"), {"rank": 1})


def test_a_missing_gpu_is_a_cluster_error():
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ClusterError):
        pick_device("cuda")
    with pytest.raises(ClusterError):
        plain_worker(RuntimeConfig(device="cuda"))


@pytest.fixture(scope="module")
def tiny_inputs(tmp_path_factory):
    """Catalog, integrated embeddings and codebook on disk, and the settings of a generator stage."""
    root = tmp_path_factory.mktemp("inputs")
    inputs = {name: root / name for name in ("catalog", "fusion", "identifiers")}
    for folder in inputs.values():
        folder.mkdir()
    trie = tiny_trie(25, 4, seed=1)
    write_tiny_catalog(inputs["catalog"], tiny_sequences(30, 25, shortest=4))
    write_embeddings(inputs["fusion"], tiny_embeddings(25))
    trie.save(inputs["identifiers"])
    settings = {
        "generator": tiny_generator(trie).config.model_dump(mode="json"),
        "order": "time",
        "seed": 0,
        "validation_users": 0,
        "validation_beam": 10,
        "mix_weight": 0.0,
    }
    return inputs, settings


def train_in(folder, tiny_inputs, **runtime) -> dict:
    inputs, settings = tiny_inputs
    launch(train_generator, make_context(folder, inputs, **runtime), settings)
    return load_file(folder / "model.safetensors")


def test_plain_training_leaves_an_artifact_that_loads(tmp_path, tiny_inputs):
    inputs, settings = tiny_inputs
    weights = train_in(tmp_path, tiny_inputs, backend="local")
    config = GeneratorConfig.model_validate(settings["generator"])
    model = load_model(config, inputs["fusion"], inputs["identifiers"], tmp_path)
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    summary = read_json(tmp_path / "summary.json")
    valid = [r["ndcg@10"] for r in read_jsonl(tmp_path / "curves.jsonl") if r["split"] == "valid"]
    assert summary["best_valid_ndcg@10"] == max(valid)
    samples, _ = holdout_samples(tiny_sequences(30, 25, shortest=4), 6, "valid", torch.device("cpu"))
    ranks = list_ranks(model, samples, Worker(), width=10)
    gains = [1 / np.log2(rank + 1) if 0 < rank <= 10 else 0.0 for rank in ranks]
    assert np.mean(gains) == pytest.approx(max(valid))


def check_same_training(first, second) -> None:
    """Same steps, and the same losses to what rounding makes of them."""
    assert load_file(first / "model.safetensors").keys() == load_file(second / "model.safetensors").keys()
    assert read_json(first / "summary.json")["steps"] == read_json(second / "summary.json")["steps"]
    curves = [
        [r["loss"] for r in read_jsonl(folder / "curves.jsonl") if r["split"] == "train"] for folder in (first, second)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("engine", [pytest.param("torch", marks=pytest.mark.slow), "deepspeed"])
def test_two_processes_train_as_one(tmp_path, tiny_inputs, engine):
    train_in(tmp_path / "one", tiny_inputs, backend="local")
    train_in(tmp_path / "two", tiny_inputs, backend="local", num_workers=2, engine=engine)
    check_same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("max_failures", [1, 0])
def test_a_typed_error_of_one_process_arrives_typed(tmp_path, max_failures):
    """The other process waits in a collective; it must not wait for ever."""
    context = make_context(tmp_path, backend="local", num_workers=2, max_failures=max_failures)
    with pytest.raises(DataError, match="made to fail") as caught:
        launch(raise_data_error, context, {"rank": 1})
    assert (caught.value.where, caught.value.got) == ("settings.rank", "1")


def test_a_dead_process_is_started_again(tmp_path):
    launch(exit_once, make_context(tmp_path, backend="local", num_workers=2, max_failures=1), {"rank": 1})
    assert read_json(tmp_path / "total.json") == 2


def test_a_dead_process_beyond_the_budget_is_a_training_error(tmp_path):
    context = make_context(tmp_path, backend="local", num_workers=2, max_failures=0)
    with pytest.raises(TrainingError, match="retries exhausted"):
        launch(exit_once, context, {"rank": 0})
    assert not (tmp_path / "total.json").exists()


@pytest.mark.slow
def test_two_ray_workers_train_as_one_process(ray_session, tmp_path, tiny_inputs):
    train_in(tmp_path / "one", tiny_inputs, backend="local")
    train_in(tmp_path / "two", tiny_inputs, backend="ray", num_workers=2, zero_stage=1)
    check_same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("max_failures", [1, 0])
def test_a_typed_error_of_one_ray_worker_arrives_typed(ray_session, tmp_path, max_failures):
    """The other worker waits in a collective; it must not wait for ever."""
    context = make_context(tmp_path, backend="ray", num_workers=2, max_failures=max_failures)
    with pytest.raises(DataError, match="made to fail") as caught:
        launch(raise_data_error, context, {"rank": 1})
    assert (caught.value.where, caught.value.got) == ("settings.rank", "1")


@pytest.mark.slow
def test_a_dead_ray_worker_is_started_again(ray_session, tmp_path):
    context = make_context(tmp_path, backend="ray", num_workers=2, max_failures=1)
    launch(exit_once, context, {"rank": 1, "after": 6})
    assert read_json(tmp_path / "total.json") == 2
