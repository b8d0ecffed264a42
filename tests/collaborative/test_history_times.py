"""Times of the history: their code by hand, the target's time is never read; hidden items; padded alignment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genrec_dist.catalog.dataset import NO_TIMESTAMP, Sequences
from genrec_dist.collaborative.backbones import TimeEncoding, hide_items
from genrec_dist.collaborative.fusion import FusionModel
from genrec_dist.collaborative.losses import full_softmax, info_nce
from genrec_dist.config import FusionConfig
from genrec_dist.errors import DataError
from genrec_dist.generator.beam import beam_search, exact_log_probabilities
from genrec_dist.testing.tiny import randomise, tiny_embeddings, tiny_generator, tiny_histories, tiny_trie
from genrec_dist.training.tasks import alignment_batch
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)
NUM_ITEMS, SPAN = 12, (1_000, 5_000)


def times_of(history: torch.Tensor, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.sort(rng.integers(*SPAN, size=(len(history), history.shape[1] + 1))))


def loss_of(model: torch.nn.Module, batch: dict) -> float:
    with torch.no_grad():
        return float(model(batch)["loss"])


def test_bumps_by_hand():
    encoding = TimeEncoding(2, 5, SPAN)
    torch.nn.init.normal_(encoding.linear.weight)
    torch.nn.init.normal_(encoding.linear.bias)
    times = torch.tensor([[1_000, 2_500, NO_TIMESTAMP]])
    bumps = [[math.exp(-0.5 * (place - bump) ** 2) for bump in range(5)] for place in (0.0, 1.5)] + [[0.0] * 5]
    expected = F.linear(torch.tensor([bumps]), encoding.linear.weight, encoding.linear.bias)
    torch.testing.assert_close(encoding(times), expected)
    assert encoding.latest(times).tolist() == [[5_000] * 3]


def test_a_new_model_is_as_if_it_read_no_times():
    assert not TimeEncoding(4, 8, SPAN)(torch.tensor([[1_500]])).any()


@pytest.mark.parametrize("backbone", ["din", "sasrec"])
@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax"])
def test_stage_one_reads_the_times_of_the_history_alone(backbone, loss):
    config = FusionConfig(
        dim=6, max_history=5, dropout=0.0, backbone=backbone, loss=loss, time_bumps=7, align_weight=0.0
    )
    torch.manual_seed(0)
    model = FusionModel(config, torch.from_numpy(tiny_embeddings(NUM_ITEMS, 4)), span=SPAN)
    randomise(model, 0.4)
    history, mask = tiny_histories(5, NUM_ITEMS, 5)
    batch = {"history": history, "mask": mask, "count": 5.0, "times": times_of(history)}
    batch |= {"target": torch.tensor([3, 8, 3, 0, 11]), "negatives": torch.tensor([1, 2, 5])}
    batch |= {"targets": history.roll(1, 1)}
    later = batch["times"].clone()
    later[:, -1] += 500
    assert loss_of(model, batch) == loss_of(model, batch | {"times": later})
    moved = batch["times"].clone()
    moved[:, 0] -= 500
    assert loss_of(model, batch) != loss_of(model, batch | {"times": moved})
    scores = model.score_catalog(history, mask, batch["times"][:, :-1])
    assert not torch.allclose(scores, model.score_catalog(history, mask, moved[:, :-1]))


def test_the_generator_reads_the_times_of_the_history_alone():
    model = tiny_generator(tiny_trie(NUM_ITEMS, 4, seed=1), time_bumps=6)
    model.time.span.copy_(torch.tensor(SPAN))
    torch.nn.init.normal_(model.time.linear.weight)
    history, mask = tiny_histories(6, NUM_ITEMS, 5)
    times = times_of(history)
    batch = {"history": history, "mask": mask, "target": torch.arange(6), "count": 6.0, "times": times}
    later = times.clone()
    later[:, -1] += 500
    assert loss_of(model, batch) == loss_of(model, batch | {"times": later})
    own = times[:, :-1]
    log_p = exact_log_probabilities(model, history, mask, times=own)
    torch.testing.assert_close(log_p.gather(1, torch.arange(6)[:, None])[:, 0], -model.target_nats(
        history, mask, torch.arange(6), own), atol=1e-5, rtol=1e-5)  # fmt: skip
    items, scores, _ = beam_search(model, history, mask, NUM_ITEMS, times=own)
    torch.testing.assert_close(scores, log_p.gather(1, items), atol=1e-5, rtol=1e-5)
    without = exact_log_probabilities(model, history, mask)
    latest = exact_log_probabilities(model, history, mask, times=torch.full_like(own, SPAN[1]))
    torch.testing.assert_close(without, latest)
    assert not torch.allclose(without, log_p)


def test_items_are_hidden_in_training_only():
    rows = torch.randn(200, 5, 3)
    assert hide_items(rows, 0.4, training=False) is rows
    torch.manual_seed(0)
    hidden = hide_items(rows, 0.4, training=True)
    gone = (hidden == 0).all(-1)
    assert torch.equal(hidden[~gone], rows[~gone])
    assert 0.35 < gone.float().mean() < 0.45


def test_smoothed_softmax_leaves_out_places_that_do_not_count():
    logits, targets = torch.randn(4, 6), torch.tensor([2, -100, 0, 5])
    log_p = logits.log_softmax(1)
    expected = -sum(0.9 * log_p[row, t] + 0.1 * log_p[row].mean() for row, t in ((0, 2), (2, 0), (3, 5)))
    torch.testing.assert_close(full_softmax(logits, targets, 0.1), expected)


@pytest.mark.parametrize("in_denominator", [True, False])
@pytest.mark.parametrize("targets", [[4, 1, 4, 9, 7], [3, 3]])
def test_a_padded_alignment_is_the_same(in_denominator, targets):
    anchors, candidates = torch.randn(NUM_ITEMS, 5), torch.randn(NUM_ITEMS, 5)
    options = {"kind": "cosine", "temperature": 0.3, "positive_in_denominator": in_denominator}

    def loss(batch: dict) -> torch.Tensor:
        items, own = batch["align_items"], batch["align_anchors"]
        size = batch.get("align_size")
        return info_nce(anchors[items[own]], candidates[items], own, num_candidates=size, **options)

    whole = loss(alignment_batch(np.array(targets), Worker()))
    for workers in (1, 3):
        parts = [alignment_batch(np.array(targets), Worker(rank, workers), 8) for rank in range(workers)]
        assert {len(part["align_items"]) for part in parts} == {9}
        assert len({len(part["align_anchors"]) for part in parts}) == 1
        torch.testing.assert_close(torch.stack([loss(part) for part in parts]).sum(), whole)


def test_the_span_is_that_of_the_train_parts():
    bounds = np.array([0, 5, 7])  # the last two of the first user are held out, nothing of the second one
    stamps = np.array([NO_TIMESTAMP, 30, 20, 90, 5, 40, 10])
    assert Sequences(bounds, np.zeros(7, np.int32), stamps, 1).span == (10, 40)


def test_a_catalog_without_times_has_no_span():
    items = np.array([0, 1, 2], np.int32)
    with pytest.raises(DataError, match="no interaction has a time"):
        _ = Sequences(np.array([0, 3]), items, np.full(3, NO_TIMESTAMP), 3).span
