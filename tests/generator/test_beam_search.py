"""Beam search and the exact scorer against an exhaustive scorer that goes item by item."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genrec_dist.generator.beam import beam_search, exact_log_probabilities
from genrec_dist.generator.search_tables import SearchTables
from genrec_dist.identifiers.trie import Trie, build_trie
from genrec_dist.testing.brute_force import BruteForce
from genrec_dist.testing.tiny import tiny_generator, tiny_histories, tiny_trie

torch.set_num_threads(1)
NUM_ITEMS = 20


def comb() -> Trie:
    """Items at levels 1, 2, 3, ...: one leaf beside every inner node."""
    codes = np.full((6, 5), -1, np.int32)
    for item in range(6):
        codes[item, : min(item, 4)] = 1
        codes[item, min(item, 4)] = 0 if item < 5 else 1
    return build_trie(codes, np.array([1, 2, 3, 4, 5, 5], np.int32))


TREES = {
    "flat": lambda: tiny_trie(NUM_ITEMS, NUM_ITEMS, depth=1),
    "depth 2": lambda: tiny_trie(NUM_ITEMS, 6, depth=2),
    "depth 4": lambda: tiny_trie(NUM_ITEMS, 4, depth=4),
    "uneven": lambda: tiny_trie(NUM_ITEMS, 5, seed=2),
    "binary": lambda: tiny_trie(NUM_ITEMS, 2, seed=1),
    "comb": comb,
}
MODELS = {
    "child": {"head": "child"},
    "child start": {"head": "child", "distill_position": "start"},
    "child dot codes": {"head": "child", "head_similarity": "dot", "encoder_input": "codes"},
    "child plain": {"head": "child", "distill_weight": 0.0},
    "per level": {"head": "per_level"},
    "per level start codes": {"head": "per_level", "distill_position": "start", "encoder_input": "codes"},
}


def unpadded(history: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(history, mask)]


def test_the_trees_are_what_they_are_called():
    depths = {name: TREES[name]().depth for name in TREES}
    assert set(depths["flat"]) == {1}
    assert set(depths["depth 2"]) == {2}
    assert set(depths["depth 4"]) == {4}
    assert len(set(depths["uneven"])) > 1
    assert len(set(depths["binary"])) > 2
    assert depths["binary"].max() > 5
    assert depths["comb"].tolist() == [1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", MODELS)
def test_exact_scorer_against_brute_force(tree, kind):
    trie = TREES[tree]()
    model = tiny_generator(trie, **MODELS[kind])
    history, mask = tiny_histories(3, trie.num_items, 5)
    log_p = exact_log_probabilities(model, history, mask)
    assert log_p.exp().sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    brute = BruteForce(model, trie.codes, trie.depth)
    with torch.no_grad():
        expected = [[brute.log_probability(row, i) for i in range(trie.num_items)] for row in unpadded(history, mask)]
    torch.testing.assert_close(log_p, torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=1e-4)
    assert log_p.std(1).min() > 0.05  # the comparison would mean nothing on uniform scores


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_beam_as_wide_as_the_catalog_is_exact(tree, kind):
    trie = TREES[tree]()
    model = tiny_generator(trie, **MODELS[kind])
    history, mask = tiny_histories(4, trie.num_items, 5, seed=1)
    exact = exact_log_probabilities(model, history, mask)
    for width in (trie.num_items, trie.num_items + 7):
        items, scores, log_p = beam_search(model, history, mask, width)
        found = items[:, : trie.num_items]
        assert found.sort(1).values.tolist() == [list(range(trie.num_items))] * 4
        assert (items[:, trie.num_items :] == -1).all()
        torch.testing.assert_close(log_p[:, : trie.num_items], exact.gather(1, found), atol=1e-5, rtol=1e-5)
        assert torch.equal(scores, log_p)
        assert (log_p[:, :-1] >= log_p[:, 1:]).all()


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("head", ["child", "per_level"])
def test_a_narrow_beam_emits_existing_items_once_and_with_their_own_probability(tree, head):
    trie = TREES[tree]()
    model = tiny_generator(trie, head=head, seed=4)
    history, mask = tiny_histories(6, trie.num_items, 5, seed=2)
    exact = exact_log_probabilities(model, history, mask)
    for width in (1, 2, 5):
        items, _, log_p = beam_search(model, history, mask, width)
        assert items.shape == (6, min(width, trie.num_items))
        for user in range(6):
            real = items[user][items[user] >= 0]
            assert len(real) >= 1
            assert len(set(real.tolist())) == len(real)
            assert real.max() < trie.num_items
            torch.testing.assert_close(log_p[user][: len(real)], exact[user, real], atol=1e-5, rtol=1e-5)
        assert (log_p[:, :1] <= exact.max(1, keepdim=True).values + 1e-5).all()


def test_a_wider_beam_never_finds_a_worse_best_item_than_greedy():
    """Not true of beams in general at every place, but width 1 is the greedy path and width N is exact."""
    trie = tiny_trie(NUM_ITEMS, 3, seed=6)
    model = tiny_generator(trie, seed=6)
    history, mask = tiny_histories(16, NUM_ITEMS, 5, seed=3)
    exact = exact_log_probabilities(model, history, mask)
    greedy = beam_search(model, history, mask, 1)[2][:, 0]
    full = beam_search(model, history, mask, NUM_ITEMS)[2][:, 0]
    assert (full >= greedy - 1e-6).all()
    torch.testing.assert_close(full, exact.max(1).values, atol=1e-5, rtol=1e-5)
    assert (full > greedy + 1e-4).any()


@pytest.mark.parametrize("tree", ["depth 2", "uneven", "binary", "comb"])
@pytest.mark.parametrize("position", ["end", "start"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_mixed_order_against_direct_computation(tree, position, similarity):
    trie, weight, reordered = TREES[tree](), 2.0, False
    model = tiny_generator(trie, seed=5, distill_position=position, distill_similarity=similarity)
    history, mask = tiny_histories(2, trie.num_items, 5, seed=5)
    items, scores, log_p = beam_search(model, history, mask, trie.num_items, mix_weight=weight)
    brute = BruteForce(model, trie.codes, trie.depth)
    for user, row in enumerate(unpadded(history, mask)):
        with torch.no_grad():
            plain = np.array([brute.log_probability(row, i) for i in range(trie.num_items)])
            dense = np.array([brute.dense_logit(row, i, behind=i) for i in range(trie.num_items)])
        mixed = plain + weight * dense
        assert items[user].tolist() == np.argsort(-mixed).tolist()
        np.testing.assert_allclose(scores[user], mixed[items[user]], atol=1e-4)
        np.testing.assert_allclose(log_p[user], plain[items[user]], atol=1e-4)
        reordered |= items[user].tolist() != np.argsort(-plain).tolist()
    assert reordered


@pytest.mark.parametrize("position", ["end", "start"])
def test_mixing_without_a_distillation_token_changes_nothing(position):
    trie = TREES["uneven"]()
    model = tiny_generator(trie, distill_weight=0.0, distill_position=position)
    history, mask = tiny_histories(3, NUM_ITEMS, 5)
    for plain, mixed in zip(beam_search(model, history, mask, 5), beam_search(model, history, mask, 5, mix_weight=0.5)):
        assert torch.equal(plain, mixed)


@pytest.mark.parametrize("encoder_input", ["item", "codes"])
@pytest.mark.parametrize("head", ["child", "per_level"])
def test_padding_means_nothing(encoder_input, head):
    trie = TREES["uneven"]()
    model = tiny_generator(trie, encoder_input=encoder_input, head=head)
    history, mask = tiny_histories(5, NUM_ITEMS, 4, seed=7)
    garbage = torch.where(mask, history, torch.randint(NUM_ITEMS, history.shape))
    longer = torch.cat([garbage, torch.randint(NUM_ITEMS, (5, 2))], 1)
    longer_mask = torch.cat([mask, torch.zeros(5, 2, dtype=torch.bool)], 1)
    expected = exact_log_probabilities(model, history, mask)
    assert torch.equal(exact_log_probabilities(model, garbage, mask), expected)
    torch.testing.assert_close(exact_log_probabilities(model, longer, longer_mask), expected, atol=1e-5, rtol=1e-5)
    alone = exact_log_probabilities(model, history[4:][:, mask[4]], mask[4:][:, mask[4]])
    torch.testing.assert_close(alone, expected[4:], atol=1e-5, rtol=1e-5)


def test_the_order_of_the_history_matters():
    model = tiny_generator(TREES["uneven"]())
    history = torch.tensor([[1, 2, 3, 4]])
    mask = torch.ones_like(history, dtype=torch.bool)
    forward, backward = (exact_log_probabilities(model, h, mask) for h in (history, history.flip(1)))
    assert (forward - backward).abs().max() > 1e-3


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mix", [0.0, 0.7])
def test_the_search_of_fixed_shapes_gives_the_same_lists(tree, kind, mix):
    """What a CUDA graph captures, beside the search that leaves out beams that have ended."""
    trie = TREES[tree]()
    model = tiny_generator(trie, **MODELS[kind], seed=8)
    history, mask = tiny_histories(7, trie.num_items, 5, seed=8)
    tables = SearchTables(model)
    for width in (1, 3, 7, trie.num_items + 2):
        items, scores, log_p = beam_search(model, history, mask, width, mix, tables)
        fixed = beam_search(model, history, mask, width, mix, tables, static=True)
        count = items.shape[1]  # fixed shapes may end in more empty places
        assert torch.equal(items, fixed[0][:, :count])
        assert (fixed[0][:, count:] == -1).all()
        torch.testing.assert_close(scores, fixed[1][:, :count], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(log_p, fixed[2][:, :count], atol=1e-5, rtol=1e-5)


def test_fixed_shapes_ask_the_device_nothing():
    """No operation whose result's shape, or whose value on the host, depends on data: a capture would fail."""

    class Recorder(TorchDispatchMode):
        seen: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(func.overloadpacket.__name__)
            if func.overloadpacket.__name__ == "index":  # masks would be turned into places
                assert all(i is None or i.dtype != torch.bool for i in args[1])
            return func(*args, **(kwargs or {}))

    trie = TREES["uneven"]()
    history, mask = tiny_histories(4, trie.num_items, 5)
    for position in ("end", "start"):
        model = tiny_generator(trie, distill_position=position)
        tables = SearchTables(model, "gather")
        with Recorder() as recorder:
            beam_search(model, history, mask, 6, 0.5, tables, static=True)
    assert "topk" in recorder.seen
    assert not recorder.seen & {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "item"}
