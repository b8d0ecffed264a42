"""Losses of the generator (equations 6 to 8) against a loop over rows and levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec_dist.generator.beam import exact_log_probabilities
from genrec_dist.generator.model import node_means
from genrec_dist.identifiers.trie import build_trie
from genrec_dist.testing.brute_force import BruteForce
from genrec_dist.testing.tiny import tiny_generator, tiny_histories, tiny_trie

torch.set_num_threads(1)
NUM_ITEMS = 16


def batch_of(num_rows: int, seed: int = 0) -> dict:
    history, mask = tiny_histories(num_rows, NUM_ITEMS, 5, seed=seed)
    target = torch.from_numpy(np.random.default_rng(seed + 1).permutation(NUM_ITEMS)[:num_rows])
    return {"history": history, "mask": mask, "target": target, "count": float(num_rows)}


@pytest.mark.parametrize("head", ["child", "per_level"])
@pytest.mark.parametrize("position", ["end", "start"])
@pytest.mark.parametrize(("smoothing", "decay"), [(0.0, 1.0), (0.2, 0.5)])
def test_losses_by_hand(head, position, smoothing, decay):
    trie = tiny_trie(NUM_ITEMS, 4, seed=3)
    assert len(set(trie.depth)) > 1
    settings = {"label_smoothing": smoothing, "level_decay": decay, "distill_weight": 0.6}
    model = tiny_generator(trie, head=head, distill_position=position, **settings)
    batch = batch_of(NUM_ITEMS)
    losses = {name: value.detach() for name, value in model(batch).items()}
    brute, code_loss, weighted, distill_loss = BruteForce(model, trie.codes, trie.depth), 0.0, 0.0, 0.0
    for history, mask, target in zip(batch["history"], batch["mask"], batch["target"].tolist()):
        row = history[mask].tolist()
        with torch.no_grad():
            for level, (logits, right) in enumerate(brute.steps(row, target, every_code=head == "per_level")):
                log_p = (logits.double().exp() / logits.double().exp().sum()).log()
                loss = -(1 - smoothing) * float(log_p[right]) - smoothing * float(log_p.mean())
                code_loss, weighted = code_loss + loss, weighted + decay**level * loss
            dense = np.array([brute.dense_logit(row, item, behind=target) for item in range(NUM_ITEMS)])
        distill_loss -= dense[target] - np.log(np.exp(dense).sum())
    assert float(losses["loss_gen"]) == pytest.approx(code_loss / NUM_ITEMS, rel=1e-5)
    assert float(losses["loss_distill"]) == pytest.approx(distill_loss / NUM_ITEMS, rel=1e-5)
    assert float(losses["loss"]) == pytest.approx((weighted + 0.6 * distill_loss) / NUM_ITEMS, rel=1e-5)


def test_code_loss_of_the_child_head_is_the_log_probability_that_search_uses():
    trie = tiny_trie(NUM_ITEMS, 3, seed=4)
    model = tiny_generator(trie, distill_position="start")
    batch = batch_of(8)
    log_p = exact_log_probabilities(model, batch["history"], batch["mask"])
    expected = -log_p.gather(1, batch["target"][:, None]).mean()
    torch.testing.assert_close(model(batch)["loss_gen"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_sampled_distillation_leaves_out_draws_of_the_target(similarity):
    """And each other draw stands for as many items as make up the catalog."""
    trie = tiny_trie(NUM_ITEMS, 4, seed=3)
    model = tiny_generator(trie, distill_similarity=similarity)
    batch = batch_of(3)
    draws = torch.tensor([batch["target"][0], 5, 5, batch["target"][1], 9])
    loss = model(batch | {"distill_negatives": draws})["loss_distill"].item()
    brute, expected = BruteForce(model, trie.codes, trie.depth), 0.0
    for history, mask, target in zip(batch["history"], batch["mask"], batch["target"].tolist()):
        row = history[mask].tolist()
        with torch.no_grad():
            own = brute.dense_logit(row, target, behind=target)
            others = [brute.dense_logit(row, item, behind=target) for item in draws.tolist() if item != target]
        stand_for = (NUM_ITEMS - 1) / len(others)
        expected += np.log(np.exp(own) + stand_for * np.exp(others).sum()) - own
    assert loss == pytest.approx(expected / 3, rel=1e-5)


def test_sampling_the_whole_catalog_is_the_full_contrast():
    model = tiny_generator(tiny_trie(NUM_ITEMS, 4, seed=3))
    batch = batch_of(6)
    full = model(batch)["loss_distill"]
    sampled = model(batch | {"distill_negatives": torch.arange(NUM_ITEMS)})["loss_distill"]
    torch.testing.assert_close(sampled, full, atol=1e-5, rtol=1e-5)


def test_losses_are_sums_over_rows_divided_by_the_global_count():
    model = tiny_generator(tiny_trie(NUM_ITEMS, 4, seed=3))
    batch = batch_of(8)
    whole = {name: value.detach() for name, value in model(batch).items()}
    for part in (slice(0, 3), slice(3, 8)):
        half = model({k: v[part] if torch.is_tensor(v) else v for k, v in batch.items()})
        whole = {name: whole[name] - half[name].detach() for name in whole}
    assert all(abs(float(rest)) < 1e-5 for rest in whole.values())


@pytest.mark.parametrize("head", ["child", "per_level"])
@pytest.mark.parametrize("encoder_input", ["item", "codes"])
@pytest.mark.parametrize("position", ["end", "start"])
def test_gradient_reaches_every_parameter(head, encoder_input, position):
    model = tiny_generator(
        tiny_trie(NUM_ITEMS, 4, seed=3), head=head, encoder_input=encoder_input, distill_position=position
    )
    model.train()
    model(batch_of(NUM_ITEMS))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert torch.isfinite(parameter.grad).all(), name


def test_label_smoothing_keeps_gradients_finite_where_nodes_are_narrow():
    model = tiny_generator(tiny_trie(NUM_ITEMS, 4, seed=3), label_smoothing=0.1)
    model(batch_of(NUM_ITEMS))["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_frozen_item_table_gets_no_gradient():
    model = tiny_generator(tiny_trie(NUM_ITEMS, 4, seed=3), item_embedding_rate=0)
    model(batch_of(4))["loss"].backward()
    assert model.item.weight.grad is None


def test_a_rated_table_starts_the_same_and_moves_by_its_share():
    moved = {}
    for rate in (1.0, 0.125):
        torch.manual_seed(0)
        trie = tiny_trie(NUM_ITEMS, 4, seed=3)
        model = tiny_generator(trie, item_embedding_rate=rate, node_embedding_rate=rate, spread=0)
        tables = {"item": model.item, "node": model.head.nodes}
        before = {name: table.table.detach().clone() for name, table in tables.items()}
        model.eval()(batch_of(NUM_ITEMS))["loss"].backward()
        felt = {name: table.weight.grad.abs() / rate > 1e-5 for name, table in tables.items()}
        torch.optim.Adam(model.parameters(), lr=1e-3).step()
        moved[rate] = {name: ((table.table - before[name])[felt[name]], before[name]) for name, table in tables.items()}
    for name in ("item", "node"):
        (whole, start), (share, slow_start) = moved[1.0][name], moved[0.125][name]
        assert torch.equal(start, slow_start)  # an eighth is exact
        assert len(whole) > 20
        torch.testing.assert_close(share, whole / 8, rtol=0.02, atol=1e-8)


@pytest.mark.parametrize("encoder_input", ["item", "codes"])
def test_an_empty_share_of_a_batch_costs_nothing(encoder_input):
    """The last batch of an epoch can be smaller than the number of workers, and a part of like lengths empty."""
    model = tiny_generator(tiny_trie(NUM_ITEMS, 4, seed=3), encoder_input=encoder_input)
    batch = batch_of(2)
    none = {k: v[:0] if torch.is_tensor(v) else v for k, v in batch.items()}
    losses = model(none)
    assert all(float(v) == 0 for v in losses.values())
    losses["loss"].backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_node_means_by_hand():
    trie = build_trie(np.array([[0, -1], [1, 0], [1, 1]], np.int32), np.array([1, 2, 2], np.int32))
    means = node_means(trie, torch.tensor([[6.0], [2.0], [4.0]]))
    assert means[:, 0].tolist() == [4.0, 6.0, 3.0, 2.0, 4.0]  # root, items 0, inner node of 1 and 2, item 1, item 2
