"""The arms of PRORec Table 5: what table each makes, what it never reads, what it does not build again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec_dist.artifacts.embeddings import ARRAY, write_embeddings
from genrec_dist.artifacts.files import read_json
from genrec_dist.artifacts.reader import read_embeddings
from genrec_dist.collaborative.similarity import concat_pca
from genrec_dist.collaborative.stage import fusion_stage
from genrec_dist.config import Config, FusionConfig, RuntimeConfig
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.testing.tiny import tiny_embeddings, tiny_optim, tiny_sequences, write_tiny_catalog

torch.set_num_threads(1)
NUM_ITEMS, TEXT, DIM = 24, 10, 6
CATALOG, SEMANTIC = (Stage(name, 1, {}, {}, lambda context: None) for name in ("catalog", "semantic"))


def stage_of(mode: str, **fusion) -> Stage:
    section = FusionConfig(mode=mode, dim=DIM, max_history=4, optim=tiny_optim(epochs=1), **fusion)
    return fusion_stage(Config(fusion=section, runtime=RuntimeConfig(backend="local")), CATALOG, SEMANTIC)


def build(tmp_path, mode: str, text_seed: int = 3, **fusion) -> tuple[np.ndarray, StageContext]:
    """Integrated table of an arm over made-up text embeddings, and what the stage wrote."""
    catalog = write_tiny_catalog(tmp_path / "catalog", tiny_sequences(30, NUM_ITEMS, shortest=4))
    texts = tmp_path / f"text-{text_seed}"
    texts.mkdir(exist_ok=True)
    if not (texts / ARRAY).exists():
        write_embeddings(texts, tiny_embeddings(NUM_ITEMS, TEXT, seed=text_seed))
    out = tmp_path / f"{mode}-{text_seed}-{len(fusion)}"
    out.mkdir()
    context = StageContext(out, {"catalog": catalog, "semantic": texts}, RuntimeConfig(backend="local"))
    stage_of(mode, **fusion).build(context)
    return read_embeddings(out), context


def cosines(table: np.ndarray) -> np.ndarray:
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    return unit @ unit.T


def test_the_semantic_arm_is_the_text_and_trains_nothing(tmp_path):
    reduced, context = build(tmp_path, "semantic")
    text = read_embeddings(context.inputs["semantic"])
    assert reduced.shape == (NUM_ITEMS, DIM)
    np.testing.assert_allclose(np.linalg.norm(reduced, axis=1), 1, rtol=1e-5)
    of_concat = concat_pca(text, np.zeros((NUM_ITEMS, DIM), np.float32))[:, :DIM]
    np.testing.assert_allclose(cosines(reduced), cosines(of_concat), atol=1e-5)
    whole, _ = build(tmp_path, "semantic", semantic_pca=False)
    np.testing.assert_allclose(cosines(whole), cosines(text), atol=1e-5)
    assert not (context.out / "model.safetensors").exists()


def test_the_collaborative_arm_never_reads_the_text(tmp_path):
    table, context = build(tmp_path, "collaborative")
    other, _ = build(tmp_path, "collaborative", text_seed=4)
    np.testing.assert_array_equal(table, other)
    learned = read_embeddings(context.out / "collaborative")
    np.testing.assert_allclose(table, learned / np.linalg.norm(learned, axis=1, keepdims=True), atol=1e-6)
    assert read_json(context.out / "similarity.json")["collaborative"]["collaborative"] == pytest.approx(1, abs=1e-6)


def test_the_arms_share_their_collaborative_table(tmp_path):
    alone, context = build(tmp_path, "collaborative")
    both, _ = build(tmp_path, "concat_pca")
    np.testing.assert_array_equal(both[:, DIM:], read_embeddings(context.out / "collaborative"))
    assert both.shape == (NUM_ITEMS, 2 * DIM)
    joint, _ = build(tmp_path, "joint")
    assert joint.shape == (NUM_ITEMS, 2 * DIM)
    assert not np.allclose(cosines(joint[:, :DIM]), cosines(alone), atol=1e-3)


def test_settings_of_the_training_do_not_rebuild_the_semantic_arm():
    assert stage_of("semantic").key == stage_of("semantic", dropout=0.1, backbone="sasrec").key
    assert stage_of("semantic").key != stage_of("semantic", semantic_pca=False).key
    assert len({stage_of(mode).key for mode in ("joint", "concat_pca", "semantic", "collaborative")}) == 4
