"""Scores of children by every kernel, beside the head's own forward; Triton's on a GPU or in its interpreter."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch

from genrec_dist.errors import ConfigError
from genrec_dist.generator import child_scores
from genrec_dist.generator.beam import beam_search, exact_log_probabilities
from genrec_dist.generator.child_scores import TorchChildScores, choose_kernel, make_child_scores
from genrec_dist.generator.search_tables import SearchTables
from genrec_dist.identifiers.trie import Trie, build_trie
from genrec_dist.testing.tiny import tiny_generator, tiny_histories, tiny_trie

torch.set_num_threads(1)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None and (DEVICE.type == "cuda" or INTERPRETED)
KERNELS = [
    pytest.param("grouped", marks=pytest.mark.skipif(DEVICE.type == "cuda", reason="waits for the device")),
    "gather",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs an NVIDIA GPU")),
]
TREES = {
    "uneven": lambda: tiny_trie(40, 6, seed=2),
    "wide": lambda: tiny_trie(300, 37, depth=2),
    "binary": lambda: tiny_trie(20, 2, seed=1),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", [{"head_similarity": "cosine"}, {"head_similarity": "dot"}, {"head": "per_level"}])
@pytest.mark.parametrize("embedding_dim", [6, 70])
def test_every_kernel_against_the_head(tree, kind, kernel, embedding_dim):
    trie = TREES[tree]()
    model = tiny_generator(trie, embedding_dim=embedding_dim, **kind).to(DEVICE)
    tables = SearchTables(model, kernel)
    generator = torch.Generator().manual_seed(0)
    for level in range(trie.max_depth):
        start, stop = trie.level_start[level : level + 2]
        nodes = torch.randint(start, stop, (83,), generator=generator).to(
            DEVICE
        )  # leaves among them, and the same twice
        hidden = torch.randn(83, 8, generator=generator).to(DEVICE)
        scores = torch.randn(83, generator=generator).to(DEVICE)
        scores[5] = float("-inf")
        with torch.no_grad():
            found = tables.child_scores(hidden, nodes, scores, level)
            logits = model.head(hidden, nodes, level)
        expected = torch.full_like(logits, float("-inf"))
        for row in range(83):
            count = int(trie.num_children[nodes[row]])
            expected[row, :count] = logits[row, :count].double().log_softmax(0).float() + scores[row]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
        assert torch.isfinite(found).any() == (trie.max_children(level) > 0)


@pytest.mark.parametrize("level", [1, 2])
def test_products_a_node_and_gathered_rows_agree(monkeypatch, level):
    """Both ways of the CPU kernel, whichever it would choose here, and a gather in several parts."""
    trie = tiny_trie(40, 6, seed=2)
    model = tiny_generator(trie, embedding_dim=70)
    table, start = model.head.nodes.weight, trie.level_start[level]
    nodes = torch.randint(int(start), int(trie.level_start[level + 1]), (60,))
    query, scores = torch.randn(60, 70), torch.zeros(60)
    kernel = TorchChildScores(model.trie, grouped=True)
    found = []
    for floats, held in ((0, 1), (1 << 40, 1), (1 << 40, 1 << 28)):
        monkeypatch.setattr(child_scores, "GROUP_FLOATS", floats)
        monkeypatch.setattr(child_scores, "GATHER_BYTES", held)
        with torch.no_grad():
            found.append(kernel.by_query(query, table, nodes, scores, level))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)


def test_kernels_by_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_kernel("auto", cpu) == "grouped"
    assert choose_kernel("auto", gpu) in ("triton", "gather")
    assert choose_kernel("gather", gpu) == "gather"
    with pytest.raises(ConfigError, match="grouped on cuda"):
        choose_kernel("grouped", gpu)
    assert isinstance(make_child_scores(tiny_generator(TREES["binary"]()).trie, "gather"), TorchChildScores)


def few_below_many() -> Trie:
    """48 first codes with one or two children each, so the root has more than any node of the next level."""
    codes = [(a, b, c) for a in range(48) for b in range(1 + a % 2) for c in range(4 + 7 * a % 25)]
    return build_trie(np.array(codes, np.int32), np.full(len(codes), 3, np.int32))


@pytest.mark.parametrize("kernel", KERNELS)
def test_dead_beams_leave_the_others_alone(kernel, monkeypatch):
    """A dead beam is at the root; where a beam is wider than a level there are many."""
    monkeypatch.setattr(child_scores, "GROUP_FLOATS", 0)
    trie = few_below_many()
    model = tiny_generator(trie, distill_weight=0.0).to(DEVICE)
    history, mask = (part.to(DEVICE) for part in tiny_histories(16, trie.num_items, 5))
    exact = exact_log_probabilities(model, history, mask)
    items, _, log_p = beam_search(model, history, mask, 100, 0.0, SearchTables(model, kernel))
    assert (items >= 0).all()
    torch.testing.assert_close(log_p, exact.gather(1, items), atol=1e-4, rtol=1e-5)
    assert [len(set(row.tolist())) for row in items] == [100] * 16
