"""Ranks by hand, seen items, popularity, and the same numbers for one worker and for two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.baselines.popularity import popularity_scores
from genrec_dist.catalog.dataset import Sequences
from genrec_dist.config import EvaluationConfig, GeneratorConfig, RuntimeConfig
from genrec_dist.evaluation import generative, ranking
from genrec_dist.evaluation.dense import batched, by_history, dense_ranks, mask_seen, target_ranks, users_at_once
from genrec_dist.evaluation.generative import drop_seen, rank_in_list
from genrec_dist.evaluation.ranking import rank_users
from genrec_dist.evaluation.stage import summarise
from genrec_dist.generator import stage as generator_stage
from genrec_dist.testing.tiny import tiny_generator, tiny_sequences, tiny_trie, write_tiny_catalog
from genrec_dist.training.samples import holdout_samples
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)
CPU = torch.device("cpu")


def test_ranks_by_hand_with_ties():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.1, 0.5]])
    ranks = [int(target_ranks(scores, torch.tensor([t]))[0]) for t in range(5)]
    assert ranks == [2, 1, 3, 5, 4]  # equal scores by item index


def test_equal_scores_give_every_rank_once():
    scores = torch.zeros(6, 6)
    assert target_ranks(scores, torch.arange(6)).tolist() == [1, 2, 3, 4, 5, 6]


def test_mask_seen_by_hand():
    batch = {
        "history": torch.tensor([[1, 3, 0], [2, 0, 0], [4, 1, 0]]),
        "mask": torch.tensor([[True, True, False], [True, False, False], [True, True, False]]),
        "target": torch.tensor([0, 0, 1]),  # the third user bought the target before
    }
    scores = torch.arange(15.0).reshape(3, 5)
    inf = float("-inf")
    assert mask_seen(scores, batch).tolist() == [
        [0.0, inf, 2.0, inf, 4.0],
        [5.0, 6.0, inf, 8.0, 9.0],
        [10.0, 11.0, 12.0, 13.0, inf],
    ]
    assert scores[0, 1] == 1.0  # the argument is left alone


def test_rank_in_list_by_hand():
    items = torch.tensor([[4, 2, 7], [4, 2, 7], [5, -1, -1]])
    assert rank_in_list(items, torch.tensor([7, 1, 5])).tolist() == [3, 0, 1]


def test_drop_seen_by_hand():
    batch = {
        "history": torch.tensor([[2, 9, 0], [3, 0, 0]]),
        "mask": torch.tensor([[True, True, False], [True, False, False]]),
        "target": torch.tensor([7, 3]),
    }
    items = torch.tensor([[9, 0, 2, 7], [0, 3, 1, -1]])
    # 0 is padding for both users, not a seen item; the second user's target stays though it was seen
    assert drop_seen(items, batch).tolist() == [[0, 7, -1, -1], [0, 3, 1, -1]]


def test_batches_are_shared_out_whole():
    shares = [batched(23, 5, Worker(rank, 3)) for rank in range(3)]
    assert shares == [[(0, 5), (15, 20)], [(5, 10), (20, 23)], [(10, 15)]]


def scorer(num_items: int):
    table = torch.randn(num_items, 4, generator=torch.Generator().manual_seed(0))
    return by_history(lambda history, mask: (table[history] * mask[..., None]).sum(1) @ table.T)


@pytest.mark.parametrize("seen_masked", [False, True])
def test_dense_ranks_against_a_full_sort(seen_masked):
    sequences = tiny_sequences(30, 20, seed=1, shortest=2)
    samples, users = holdout_samples(sequences, 4, "test", CPU)
    score = scorer(20)
    ranks = dense_ranks(score, samples, 4, Worker(), batch_size=7, seen_masked=seen_masked)
    assert len(ranks) == len(users)
    for rank, user in zip(ranks, users):
        own = sequences.items[sequences.indptr[user] : sequences.indptr[user + 1]]
        history, target = own[-5:-1], own[-1]
        alone = {"history": torch.from_numpy(history.astype(np.int64))[None], "mask": torch.ones(1, len(history))}
        scores = score(alone)[0].numpy()
        if seen_masked:
            scores[history] = -np.inf
        assert rank == np.argsort(-scores, kind="stable").tolist().index(target) + 1


def test_dense_ranks_of_the_first_users_only():
    samples, _ = holdout_samples(tiny_sequences(30, 20), 4, "valid", CPU)
    everyone = dense_ranks(scorer(20), samples, 4, Worker(), batch_size=4)
    assert dense_ranks(scorer(20), samples, 4, Worker(), batch_size=4, limit=9).tolist() == everyone[:9].tolist()
    assert len(dense_ranks(scorer(20), samples, 4, Worker(), limit=10_000)) == len(samples)


@pytest.mark.parametrize(("device", "small"), [("cpu", 256), ("cuda", 2772)])
def test_users_at_once_by_hand(device, small):
    """2^25 scores at most: 2,772 users of 12,101 items, one of more items than that."""
    assert users_at_once(12_101, torch.device(device)) == small
    assert users_at_once(10, torch.device(device)) == {"cpu": 256, "cuda": 4096}[device]
    assert users_at_once(1 << 24, torch.device(device)) == 2
    assert users_at_once(1 << 30, torch.device(device)) == 1


class Share(Worker):
    """A worker whose shares the test adds up itself."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("world_size", [2, 3])
def test_dense_ranks_do_not_depend_on_the_number_of_workers(world_size):
    samples, _ = holdout_samples(tiny_sequences(50, 20), 4, "test", CPU)
    alone = dense_ranks(scorer(20), samples, 4, Worker(), batch_size=4)
    shares = [dense_ranks(scorer(20), samples, 4, Share(r, world_size), batch_size=4) for r in range(world_size)]
    assert (sum(shares) == alone).all()
    assert all((share == 0).any() for share in shares)


def test_popularity_counts_the_train_part_only():
    """User 0: 4 items, the last two held out. User 1: 2 items, nothing held out."""
    sequences = Sequences(
        np.array([0, 4, 6]), np.array([0, 1, 2, 3, 1, 4], np.int32), np.zeros(6, np.int64), num_items=6
    )
    assert popularity_scores(sequences).tolist() == [1, 2, 0, 0, 1, 0]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Catalog, integrated embeddings, codebook and an untrained generator on disk."""
    root = tmp_path_factory.mktemp("artifacts")
    trie = tiny_trie(25, 4, seed=1)
    model = tiny_generator(trie, distill_position="start")
    for name in ("fusion", "identifiers", "generator"):
        (root / name).mkdir()
    write_tiny_catalog(root / "catalog", tiny_sequences(60, 25, seed=2))
    write_embeddings(root / "fusion", model.integrated.numpy())
    trie.save(root / "identifiers")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(weights, root / "generator" / "model.safetensors")
    inputs = {path.name: path for path in root.iterdir()}
    evaluation = EvaluationConfig(beam_width=20, mix_weight=0.3, exact_users=20, bootstrap_samples=10)
    settings = {
        "method": "generator",
        "order": "time",
        "seed": 0,
        "evaluation": evaluation.model_dump(mode="json"),
        "generator": model.config.model_dump(mode="json"),
    }
    return inputs, settings, evaluation


def shares_of(artifacts, world_size: int, **changes) -> list[dict[str, np.ndarray]]:
    inputs, settings, _ = artifacts
    runtime = RuntimeConfig(eval_batch_size=7, backend="local")
    settings = settings | changes
    return [rank_users(Worker(r, world_size), inputs, settings, runtime, ["test"])["test"] for r in range(world_size)]


def test_generative_ranks_do_not_depend_on_the_number_of_workers(artifacts):
    (alone,) = shares_of(artifacts, 1)
    shares = shares_of(artifacts, 2)
    assert set(alone) == {"rank", "rank_masked", "rank_without_mix", "rank_exact", "rank_checked", "same_top10"}
    for name, expected in alone.items():
        assert (shares[0][name] + shares[1][name] == expected).all(), name
        assert not (shares[0][name] * shares[1][name]).any(), name
    assert (alone["rank"] > 0).any()
    assert (alone["rank"] != alone["rank_without_mix"]).any()


def test_both_splits_take_one_load_and_search_every_user_once(artifacts, monkeypatch):
    inputs, settings, _ = artifacts
    loads, searched = [], []
    for module, name in ((generator_stage, "load_model"), (ranking, "Catalog")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=original, _n=name: loads.append(_n) or _f(*a))
    search = generative.beam_search
    monkeypatch.setattr(generative, "beam_search", lambda *a, **k: searched.append(len(a[1])) or search(*a, **k))
    runtime = RuntimeConfig(eval_batch_size=7, backend="local")
    ranks = rank_users(Worker(), inputs, settings, runtime)
    assert sorted(loads) == ["Catalog", "load_model"]
    assert sum(searched) == len(ranks["test"]["rank"]) + len(ranks["valid"]["rank"])
    assert searched[:3] == [16, 4, 7]  # the 20 users of the exact check first
    for split in ("test", "valid"):
        alone = rank_users(Worker(), inputs, settings, runtime, [split])[split]
        assert set(alone) == set(ranks[split])
        assert all((alone[name] == ranks[split][name]).all() for name in alone)
        assert ("rank_exact" in alone) == (split == "test")


def test_the_batch_size_decides_no_rank(artifacts):
    inputs, settings, _ = artifacts
    small, large = (
        rank_users(Worker(), inputs, settings, RuntimeConfig(eval_batch_size=size, backend="local"), ["test"])["test"]
        for size in (3, 1000)
    )
    assert all((small[name] == large[name]).all() for name in small)


def test_validation_ranks_are_the_evaluations(artifacts):
    inputs, settings, evaluation = artifacts
    runtime = RuntimeConfig(eval_batch_size=7, backend="local")
    expected = rank_users(Worker(), inputs, settings, runtime, ["valid"])["valid"]["rank"]
    config = GeneratorConfig.model_validate(settings["generator"])
    model = generator_stage.load_model(config, inputs["fusion"], inputs["identifiers"], inputs["generator"])
    samples, _ = holdout_samples(tiny_sequences(60, 25, seed=2), model.max_history, "valid", CPU)
    width, mix = evaluation.beam_width, evaluation.mix_weight
    ranks = generative.list_ranks(model, samples, Worker(), width=width, mix_weight=mix, batch_size=5)
    assert ranks.tolist() == expected.tolist()
    shares = [generative.list_ranks(model, samples, Share(r, 2), width=width, mix_weight=mix) for r in range(2)]
    assert sum(shares).tolist() == expected.tolist()


def test_exact_check_covers_the_first_users(artifacts):
    (ranks,) = shares_of(artifacts, 1)
    assert (ranks["rank_exact"][:20] > 0).all()
    assert (ranks["rank_exact"][20:] == 0).all()
    assert (ranks["same_top10"][:20] >= 9).all()  # beam 20 of 25 items


def test_popularity_ranks_do_not_depend_on_the_number_of_workers(artifacts):
    (alone,) = shares_of(artifacts, 1, method="popularity")
    shares = shares_of(artifacts, 3, method="popularity")
    for name, expected in alone.items():
        assert (sum(share[name] for share in shares) == expected).all()
    assert (alone["rank_masked"] <= alone["rank"]).all()
    assert (alone["rank_masked"] < alone["rank"]).any()


def test_summary_of_ranks(artifacts):
    _, settings, evaluation = artifacts
    (test,) = shares_of(artifacts, 1)
    tied = np.zeros(len(test["rank"]), bool)
    tied[::2] = True
    summary = summarise(test, test, tied, settings, evaluation)
    assert summary["users"] == len(tied)
    assert summary["beam_width"] == 20
    assert summary["exact"]["users"] == 20
    assert summary["without_ties"]["users"] == (~tied).sum()
    hits = ((test["rank"] > 0) & (test["rank"] <= 10)).mean()
    assert summary["test"]["recall@10"] == pytest.approx(hits)
    untied = ((test["rank"] > 0) & (test["rank"] <= 10))[~tied].mean()
    assert summary["without_ties"]["recall@10"] == pytest.approx(untied)
    low, high = summary["intervals"]["recall@10"]
    assert low <= hits <= high
    nobody = summarise(test, test, np.ones(len(tied), bool), settings, evaluation)
    assert nobody["without_ties"] == {"users": 0}
