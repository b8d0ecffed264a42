"""RQ-VAE: losses by hand, one input as a special case of two, workers, resume, streamed inputs, the whole stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.config import Config, IdentifierConfig, RqvaeConfig, RuntimeConfig
from genrec_dist.errors import DataError
from genrec_dist.identifiers import rqvae_training
from genrec_dist.identifiers.collisions import uniqueness
from genrec_dist.identifiers.rqvae import RqVae
from genrec_dist.identifiers.rqvae_training import CODES, RqvaeTask, train_rqvae
from genrec_dist.identifiers.stage import identifier_stage
from genrec_dist.identifiers.tables import Tables
from genrec_dist.identifiers.trie import Trie
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.testing.faults import FaultyTask, InjectedFault
from genrec_dist.testing.processes import run_processes
from genrec_dist.training.launch import launch
from genrec_dist.training.worker import Worker

NUM_ITEMS, CPU = 90, torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two tables of one world: items have a topic (text) and an audience (behaviour)."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("tables")
    out = {}
    for name, width, groups in (("semantic", 12, 5), ("collaborative", 6, 4)):
        centres = rng.normal(size=(groups, width)) * 3
        values = centres[rng.integers(groups, size=NUM_ITEMS)] + rng.normal(size=(NUM_ITEMS, width))
        out[name] = root / name
        out[name].mkdir()
        write_embeddings(out[name], (values * 0.1 + 5).astype(np.float32), rows_per_shard=16)
    return out


def section(**rqvae) -> IdentifierConfig:
    optim = {"epochs": 6, "batch_size": 32, "evaluate_every": 2, "warmup_steps": 2} | rqvae.pop("optim", {})
    small = {"hidden": [10], "latent_dim": 4, "optim": optim}
    more = {key: rqvae.pop(key) for key in ("collisions", "num_levels", "num_clusters") if key in rqvae}
    return IdentifierConfig(tokenizer="rqvae", **({"num_clusters": 8, "num_levels": 3} | more), rqvae=small | rqvae)


def context(out: Path, inputs: dict[str, Path], **runtime) -> StageContext:
    out.mkdir(exist_ok=True)
    plain = {"backend": "local", "num_threads": 1, "device": "cpu"}
    return StageContext(out, inputs, RuntimeConfig(**(plain | runtime)), key=out.name)


def trained(out: Path, inputs: dict[str, Path], config: IdentifierConfig, **runtime) -> dict[str, torch.Tensor]:
    launch(train_rqvae, context(out, inputs, **runtime), {"identifiers": config.model_dump(), "seed": 1})
    return load_file(out / "model.safetensors")


def test_losses_by_hand() -> None:
    """Identity networks and one code: everything can be worked out."""
    config = RqvaeConfig(hidden=[], latent_dim=2, semantic_weight=0.75, commit_weight=0.5, commitment="total")
    scales = {"semantic": torch.tensor([[1.0, 0.0], [2.0, 1.0]]), "collaborative": torch.tensor([[0.0], [1.0]])}
    model = RqVae(config, 1, 2, {"semantic": 2, "collaborative": 1}, scales)
    with torch.no_grad():
        for linear, weight in (
            (model.encoder[0], [[1.0, 0.0], [0.0, 1.0]]),
            (model.project["collaborative"], [[1.0], [0.0]]),
            (model.decoders["semantic"][0], [[1.0, 0.0], [0.0, 1.0]]),
            (model.decoders["collaborative"][0], [[0.0, 1.0]]),
        ):
            linear.weight.copy_(torch.tensor(weight))
            linear.bias.zero_()
    model.quantizer._set(0, torch.arange(2), torch.tensor([[1.0, 3.0], [-9.0, -9.0]]))
    batch = {"semantic": torch.tensor([[5.0, 4.0]]), "collaborative": torch.tensor([[2.0]]), "count": 1.0}
    # standardised: (2, 4) and (2); h = .75 (2, 4) + .25 (2, 0) = (2, 3); code (1, 3)
    # L_sem = |(1, 3) - (2, 4)|^2 / 2 = 1, L_cf = (3 - 2)^2 = 1, L_commit = |(2, 3) - (1, 3)|^2 / 2 = .5
    assert model.encode(model.standardise(batch)).tolist() == [[2.0, 3.0]]
    losses = {name: value.item() for name, value in model(batch).items()}
    assert losses == {
        "loss_semantic": 1.0,
        "loss_collaborative": 1.0,
        "loss_commit": 0.5,
        "loss": 0.75 * 1.0 + 0.25 * 1.0 + 0.5 * 0.5,
    }


def test_lambda_one_is_the_model_of_the_text_alone(tmp_path, folders) -> None:
    both = trained(tmp_path / "both", folders, section(semantic_weight=1.0))
    alone = trained(tmp_path / "alone", {"semantic": folders["semantic"]}, section())
    assert set(alone) < set(both)
    assert all(torch.equal(both[name], value) for name, value in alone.items())
    codes = [np.load(tmp_path / name / "scratch" / CODES) for name in ("both", "alone")]
    assert np.array_equal(*codes)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_training_explains_the_tables(tmp_path, folders, codebook) -> None:
    config = section(
        codebook=codebook, ema_decay=0.9, optim={"epochs": 60, "learning_rate": 1e-2, "evaluate_every": 20}
    )
    trained(tmp_path / "out", folders, config)
    curve = [r for r in read_jsonl(tmp_path / "out" / "curves.jsonl") if r["split"] == "valid"]
    assert curve[-1]["explained"] > 0.6
    facts = read_json(tmp_path / "out" / "rqvae.json")
    best = max(record["explained"] for record in curve)
    assert sum(facts["weights"][n] * facts["explained"][n] for n in facts["weights"]) == pytest.approx(best, abs=1e-5)
    # losses are in the inputs' own units: error = (1 - explained) x variance, here per column with equal weight
    semantic = EmbeddingStore(folders["semantic"]).read()
    assert facts["losses"]["semantic"] == pytest.approx(
        (1 - facts["explained"]["semantic"]) * semantic.var(0).mean(), rel=0.3
    )


def _work(worker: Worker, root: Path, inputs: dict[str, Path], variant: dict) -> None:
    train_rqvae(worker, context(root, inputs), {"identifiers": section(**variant).model_dump(), "seed": 1})


@pytest.mark.parametrize("variant", [{}, {"codebook": "gradient", "sinkhorn_epsilon": 0.05}, {"revive_below": 0.9}])
def test_workers_do_not_change_the_result(tmp_path, folders, variant) -> None:
    one = trained(tmp_path / "one", folders, section(**variant))
    (tmp_path / "two").mkdir()
    run_processes(_work, 2, tmp_path / "two", folders, variant)
    two = load_file(tmp_path / "two" / "model.safetensors")
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=2e-4), name
    latent = [EmbeddingStore(tmp_path / name / "latent").read() for name in ("one", "two")]
    assert np.allclose(*latent, atol=2e-4)
    codes = [np.load(tmp_path / name / "scratch" / CODES) for name in ("one", "two")]
    assert (codes[0] == codes[1]).mean() > 0.98  # a tie may fall either way


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path, folders, codebook, monkeypatch) -> None:
    config = section(codebook=codebook, revive_below=0.5)
    whole = trained(tmp_path / "whole", folders, config)
    original = rqvae_training.RqvaeTask
    faults = {"crash_at": 11}

    def faulty(*arguments):
        task = original(*arguments)
        wrapped = FaultyTask(task, **faults)
        wrapped.after_step = task.after_step
        return wrapped

    monkeypatch.setattr(rqvae_training, "RqvaeTask", faulty)
    with pytest.raises(InjectedFault):
        trained(tmp_path / "killed", folders, config)
    monkeypatch.setattr(rqvae_training, "RqvaeTask", original)
    again = trained(tmp_path / "killed", folders, config)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert (tmp_path / "killed/rqvae.json").read_bytes() == (tmp_path / "whole/rqvae.json").read_bytes()


def test_streamed_inputs_give_the_same(folders) -> None:
    resident, streamed = Tables(folders, CPU), Tables(folders, CPU, resident_bytes=0)
    assert resident.resident is not None
    assert streamed.resident is None
    items = np.array([3, 88, 17, 3])
    for name, values in resident.rows(items).items():
        assert torch.equal(values, streamed.rows(items)[name])
        whole = EmbeddingStore(folders[name]).read().astype(np.float64)
        mean, deviation = streamed.scales()[name]
        assert np.allclose(mean, whole.mean(0), rtol=1e-6)
        assert np.allclose(deviation, whole.std(0), rtol=1e-4)
    worker = Worker()
    losses = [RqvaeTask(section(), t, worker, 0).model(t.rows(items) | {"count": 4.0}) for t in (resident, streamed)]
    assert losses[0]["loss"].item() == losses[1]["loss"].item()


def test_joint_table_weighs_distances(folders) -> None:
    tables = Tables(folders, CPU)
    joint = tables.joint(0.3)
    parts = [(s.read() - s.read().mean(0)) / s.read().std(0) for s in tables.stores.values()]
    wanted = sum(w * np.square(p[3] - p[7]).mean() for w, p in zip((0.3, 0.7), parts))
    assert np.square(joint[3] - joint[7]).sum() == pytest.approx(wanted, rel=1e-3)
    alone = Tables({"semantic": folders["semantic"]}, CPU)
    assert np.array_equal(alone.joint(0.3), EmbeddingStore(folders["semantic"]).read())


def test_tables_of_different_length(tmp_path, folders) -> None:
    write_embeddings(tmp_path, np.ones((3, 2), np.float32))
    with pytest.raises(DataError, match="different numbers of items"):
        Tables(folders | {"collaborative": tmp_path}, CPU)


def test_a_constant_column_and_an_item_without_embedding(tmp_path) -> None:
    from genrec_dist.artifacts.embeddings import EmbeddingWriter

    values = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    values[:, 1] = 3.0
    values[5] = np.nan
    EmbeddingWriter(tmp_path, 20, 4).write(0, values, [{"row": 5, "reason": "no text"}])
    tables = Tables({"semantic": tmp_path}, CPU)
    scale = tables.scales()["semantic"]
    assert scale[1, 1] == 1.0
    assert np.allclose(scale[0], np.delete(values, 5, 0).mean(0), atol=1e-6)
    assert not tables.rows(np.array([5]))["semantic"].any()


def build(config: Config, tmp_path: Path, folders: dict[str, Path], name: str, **runtime) -> Path:
    inputs = {role: Stage(role, 1, {}, {}, lambda _: None) for role in folders}
    out = tmp_path / name
    identifier_stage(config, inputs).build(context(out, folders, **runtime))
    return out


@pytest.mark.parametrize("collisions", ["dedup", "sinkhorn", "nearest_free"])
def test_stage_leaves_unique_codes(tmp_path, folders, collisions) -> None:
    config = Config(identifiers=section(collisions=collisions, num_levels=2, num_clusters=16))
    out = build(config, tmp_path, folders, "out")
    trie, quality = Trie.load(out), read_json(out / "quality.json")
    assert quality["unique_fraction"] == 1.0
    assert quality["before_collisions"]["coverage"] < 1.0
    assert quality["collision_handling"]["method"] == collisions
    assert quality["collision_handling"]["after"] == 1.0
    assert trie.max_depth == (3 if collisions == "dedup" else 2)
    nearest = np.load(out / "scratch" / CODES)
    assert uniqueness(nearest)["coverage"] == quality["before_collisions"]["coverage"]
    codebooks = load_file(out / "model.safetensors")["quantizer.codebooks"].numpy()
    latent = EmbeddingStore(out / "latent").read()
    left = latent
    for level, table in enumerate(codebooks):
        assert np.array_equal(np.square(left[:, None] - table[None]).sum(2).argmin(1), nearest[:, level])
        left = left - table[nearest[:, level]]
    values = sum(table[trie.codes[:, level]] for level, table in enumerate(codebooks))
    assert np.allclose(EmbeddingStore(out).read(), values, atol=1e-6)


@pytest.mark.parametrize("tokenizer", ["hierarchical_kmeans", "random"])
def test_other_tokenizers_read_two_tables(tmp_path, folders, tokenizer) -> None:
    config = Config(identifiers={"tokenizer": tokenizer, "num_clusters": 8, "num_levels": 3})
    out = build(config, tmp_path, folders, "out")
    assert Trie.load(out).num_items == NUM_ITEMS
    assert EmbeddingStore(out).dim == 18
    kept = read_json(out / "quality.json")["neighbour_preservation"]
    assert (kept["recall"] > 3 * kept["chance"]) == (tokenizer == "hierarchical_kmeans")


@pytest.mark.parametrize(
    ("tokenizer", "keys"),
    [
        ("hierarchical_kmeans", "balanced iterations metric num_clusters num_starts seed start tokenizer tolerance"),
        ("random", "num_clusters num_levels seed tokenizer"),
    ],
)
def test_an_artifact_depends_on_its_own_tokenizers_settings_only(tokenizer, keys) -> None:
    config = Config.model_validate({"identifiers": {"tokenizer": tokenizer}})
    stage = identifier_stage(config, {"fusion": Stage("fusion", 1, {}, {}, lambda _: None)})
    assert sorted(stage.settings) == keys.split()


@pytest.mark.slow
def test_ray_train_gives_the_same_codes(tmp_path, folders, ray_session) -> None:
    """Two real Ray Train workers: the codes of one plain process."""
    config = section(collisions="nearest_free")
    local = trained(tmp_path / "local", folders, config)
    ray = trained(tmp_path / "ray", folders, config, backend="ray", num_workers=2)
    for name, value in local.items():
        assert torch.allclose(ray[name], value, atol=2e-4), name
