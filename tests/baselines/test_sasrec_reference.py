"""SASRec reference: loss at every place, ranking by the same scores, the stage's worker function."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.baselines.sasrec import SasrecModel, sasrec_stage, train_sasrec
from genrec_dist.config import Config, RuntimeConfig, SasrecConfig
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.testing.tiny import randomise, tiny_histories, tiny_optim, tiny_sequences, write_tiny_catalog
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)
NUM_ITEMS = 18


def make_model(similarity: str) -> SasrecModel:
    torch.manual_seed(0)
    config = SasrecConfig(dim=8, num_heads=2, dropout=0.0, max_history=6, similarity=similarity, temperature=0.25)
    model = SasrecModel(config, NUM_ITEMS)
    randomise(model, 0.4)
    return model.eval()


@pytest.mark.parametrize("similarity", ["cosine", "inner"])
@torch.no_grad()
def test_loss_is_the_mean_over_places_of_the_catalog_cross_entropy(similarity):
    model = make_model(similarity)
    history, mask = tiny_histories(5, NUM_ITEMS, 6)
    targets = torch.randint(NUM_ITEMS, history.shape, generator=torch.Generator().manual_seed(1))
    loss = model({"history": history, "mask": mask, "targets": targets, "count": float(mask.sum())})["loss"]
    scale, total = 4.0 if similarity == "cosine" else 1.0, 0.0
    for row, keep, target in zip(history, mask, targets):
        for place in range(int(keep.sum())):
            scores = model.score_catalog(row[None, : place + 1], keep[None, : place + 1])[0] * scale
            weights = scores.double().exp()
            total -= math.log(weights[target[place]] / weights.sum())
    assert float(loss) == pytest.approx(total / int(mask.sum()), rel=1e-5)


@torch.no_grad()
def test_cosine_scores_ignore_the_length_of_item_vectors_and_inner_ones_do_not():
    history, mask = tiny_histories(4, NUM_ITEMS, 6)
    for similarity in ("cosine", "inner"):
        model = make_model(similarity)
        before = model.score_catalog(history, mask)
        unseen = next(i for i in range(NUM_ITEMS) if i not in history)
        model.item.weight[unseen] *= 3
        after = model.score_catalog(history, mask)
        assert torch.allclose(before[:, unseen], after[:, unseen], atol=1e-6) == (similarity == "cosine")


def test_training_writes_the_artifact(tmp_path):
    catalog = write_tiny_catalog(tmp_path / "catalog", tiny_sequences(30, NUM_ITEMS, shortest=4))
    section = SasrecConfig(dim=8, num_heads=2, max_history=4, optim=tiny_optim(epochs=3))
    settings = {"sasrec": section.model_dump(mode="json"), "order": "time", "seed": 0, "validation_users": 0}
    out = tmp_path / "out"
    out.mkdir()
    train_sasrec(Worker(), StageContext(out, {"catalog": catalog}, RuntimeConfig(backend="local")), settings)
    weights = load_file(out / "model.safetensors")
    SasrecModel(section, NUM_ITEMS).load_state_dict(weights, strict=True)
    assert read_json(out / "summary.json")["epochs"] == 3
    assert {record["split"] for record in read_jsonl(out / "curves.jsonl")} == {"train", "valid"}


def test_the_two_similarities_are_two_artifacts():
    catalog = Stage("catalog", 1, {}, {}, lambda context: None)
    inner, cosine = (sasrec_stage(Config(), catalog, kind) for kind in ("inner", "cosine"))
    assert inner.key != cosine.key
    assert (inner.title, cosine.title) == ("sasrec_inner", "sasrec_cosine")
    tuned = Config(runtime=RuntimeConfig(num_workers=4), report={"tsne_items": 0})
    assert sasrec_stage(tuned, catalog, "inner").key == inner.key
