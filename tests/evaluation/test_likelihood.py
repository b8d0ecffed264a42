"""Bits an item against the whole catalog's distribution, worked out item by item; parameters by convention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genrec_dist.baselines.sasrec import SasrecModel
from genrec_dist.config import SasrecConfig
from genrec_dist.evaluation.dense import by_history, dense_ranks
from genrec_dist.evaluation.likelihood import code_bits, dense_validation, mean_bits
from genrec_dist.evaluation.metrics import rank_metrics
from genrec_dist.generator.beam import exact_log_probabilities
from genrec_dist.generator.parameters import count_parameters
from genrec_dist.testing.tiny import (
    randomise,
    tiny_generator,
    tiny_gpt,
    tiny_histories,
    tiny_sequences,
    tiny_trie,
)
from genrec_dist.training.samples import HistorySamples, holdout_samples
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)
NUM_ITEMS = 18
CPU = torch.device("cpu")
PARTS = [
    pytest.param(make, settings, id=f"{make.__name__}-{'-'.join(map(str, settings.values()))}")
    for make, settings in (
        (tiny_generator, {"distill_position": "end"}),
        (tiny_generator, {"distill_position": "start", "label_smoothing": 0.2}),
        (tiny_generator, {"encoder_input": "codes", "distill_weight": 0.0}),
        (tiny_generator, {"head": "per_level"}),
        (tiny_gpt, {"head": "child"}),
        (tiny_gpt, {"head": "per_level", "label_smoothing": 0.2}),
    )
]


def holdouts() -> HistorySamples:
    return holdout_samples(tiny_sequences(9, NUM_ITEMS, shortest=3), 6, "valid", CPU)[0]


@torch.no_grad()
def catalog_probabilities(model, history: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Probability of every item, each asked for by itself: (B, num_items) float64."""
    users = len(history)
    every = (part.repeat_interleave(NUM_ITEMS, 0) for part in (history, mask))
    return model.target_nats(*every, torch.arange(NUM_ITEMS).repeat(users)).double().neg().exp().view(users, -1)


@pytest.mark.parametrize(("make", "settings"), PARTS)
def test_probabilities_of_all_items_add_up_to_one_and_are_those_of_the_search(make, settings):
    model = make(tiny_trie(NUM_ITEMS, 4, seed=1), **settings)
    history, mask = tiny_histories(5, NUM_ITEMS, 6)
    found = catalog_probabilities(model, history, mask)
    total = found.sum(1)
    if model.config.head == "per_level":  # codes that no item has take their share
        assert bool((total < 0.999).all())
        assert bool((total > 0.01).all())
        return
    torch.testing.assert_close(total, torch.ones(5, dtype=torch.float64), atol=1e-5, rtol=0)
    searched = exact_log_probabilities(model, history, mask).double().exp()
    torch.testing.assert_close(found, searched, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_a_per_level_head_is_charged_for_codes_that_no_item_has():
    """Its softmax over all K codes, level by level, read off the states."""
    model = tiny_gpt(tiny_trie(NUM_ITEMS, 4, seed=1), head="per_level")
    history, mask = tiny_histories(1, NUM_ITEMS, 4)
    target, length = torch.tensor([7]), int(mask.sum())
    states = model.states(torch.cat([history[:, :length], target[None]], 1))[0, length]
    path, depth = model.trie.item_path[7], int(model.trie.depth[7])
    expected = 0.0
    for level in range(depth):
        weights = model.head.code_logits(states[level : level + 1], level)[0].double().exp()
        assert len(weights) == model.trie.num_codes
        expected -= math.log(weights[model.trie.code[path[level]]] / weights.sum())
    assert float(model.target_nats(history, mask, target)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [tiny_generator, tiny_gpt])
def test_bits_are_the_mean_over_users_of_the_catalogs_log_loss(make):
    model, samples = make(tiny_trie(NUM_ITEMS, 4, seed=1), head="child"), holdouts()
    total = 0.0
    for user in range(len(samples)):
        batch = samples.gather(torch.tensor([user]), 6)
        p = catalog_probabilities(model, batch["history"], batch["mask"])[0]
        total -= math.log2(p[batch["target"][0]] / p.sum())
    found = code_bits(model.target_nats, samples, 6, Worker())
    assert found["bits_per_item"] == pytest.approx(total / len(samples), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("similarity", ["cosine", "inner"])
def test_dense_bits_are_those_of_the_softmax_over_the_catalog(similarity):
    torch.manual_seed(0)
    config = SasrecConfig(dim=8, num_heads=2, dropout=0.0, max_history=6, similarity=similarity, temperature=0.25)
    model, samples = SasrecModel(config, NUM_ITEMS), holdouts()
    randomise(model, 0.4)
    scale, total = 4.0 if similarity == "cosine" else 1.0, 0.0
    for user in range(len(samples)):
        batch = samples.gather(torch.tensor([user]), 6)
        weights = (model.score_catalog(batch["history"], batch["mask"])[0].double() * scale).exp()
        total -= math.log2(weights[batch["target"][0]] / weights.sum())
    found = dense_validation(by_history(model.score_catalog), scale, samples, 6, Worker(), batch_size=7)
    assert found["bits_per_item"] == pytest.approx(total / len(samples), rel=1e-5)
    ranks = rank_metrics(dense_ranks(by_history(model.score_catalog), samples, 6, Worker()), [10])
    assert {name: found[name] for name in ranks} == ranks


def test_bits_do_not_depend_on_how_users_are_shared_out(monkeypatch):
    monkeypatch.setattr("genrec_dist.evaluation.likelihood.BATCH_USERS", 4)
    model, samples = tiny_generator(tiny_trie(NUM_ITEMS, 4, seed=1)), holdouts()
    alone = code_bits(model.target_nats, samples, 6, Worker())
    shares: list[torch.Tensor] = []

    class Share(Worker):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            shares.append(tensor.clone())
            return tensor

    for rank in range(3):
        code_bits(model.target_nats, samples, 6, Share(rank, 3))
    assert mean_bits(torch.stack(shares).sum(0).numpy()) == alone
    assert code_bits(model.target_nats, samples, 6, Worker(), limit=5) != alone


def test_mean_bits_by_hand():
    assert mean_bits(np.log([2.0, 8.0]))["bits_per_item"] == pytest.approx(2)
    assert mean_bits(np.zeros(0)) == {}


def test_parameters_by_convention():
    trie = tiny_trie(NUM_ITEMS, 4, seed=1)
    child, flat = tiny_generator(trie), tiny_generator(trie, head="per_level", item_embedding_rate=0)
    for model, tables in (
        (child, ("item", "position", "step", "head.nodes")),
        (flat, ("position", "step", "code_in", "head")),
    ):
        found = count_parameters(model)
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        kept = sum(n for name, n in trained.items() if not name.startswith(tuple(f"{table}." for table in tables)))
        layers = sum(n for name, n in trained.items() if name.startswith(("encoder.", "decoder.")))
        assert found == {"total": sum(trained.values()), "non_embedding": kept, "layers": layers}
        assert layers < kept < found["total"]
