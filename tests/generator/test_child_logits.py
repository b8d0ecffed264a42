"""Products with the children of nodes: every way against one loop, values and gradients."""

from __future__ import annotations

import pytest
import torch

from genrec_dist.collaborative.losses import blocked_softmax, full_softmax
from genrec_dist.generator import child_logits as module
from genrec_dist.generator.child_logits import child_logits
from genrec_dist.generator.heads import ChildHead, DeviceTrie, code_losses, node_means
from genrec_dist.testing.tiny import tiny_trie

ROWS, NODES, WIDTH, DIM = 9, 12, 5, 4


def material() -> tuple[torch.Tensor, ...]:
    """Rows of few nodes, of one that is the first of its level, of the last, and of nodes without children."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    level = torch.randn(NODES, DIM, generator=generator, dtype=torch.float64)
    first = torch.tensor([0, 3, 0, 0, 7, 3, 0, 7, 0])
    count = torch.tensor([3, 4, 3, 0, 5, 4, 0, 5, 3])
    return query, level, first, count


def by_hand(query, level, first, count) -> torch.Tensor:
    out = torch.full((ROWS, WIDTH), float("-inf"), dtype=torch.float64)
    for row, (f, c) in enumerate(zip(first.tolist(), count.tolist())):
        for child in range(c):
            out[row, child] = query[row] @ level[f + child]
    return out


def test_grouped_is_the_loop():
    assert torch.allclose(child_logits(*material(), WIDTH), by_hand(*material()))


def test_gradients():
    query, level, first, count = material()
    real = torch.isfinite(by_hand(query, level, first, count))
    torch.autograd.gradcheck(
        lambda q, t: child_logits(q, t, first, count, WIDTH)[real], (query.requires_grad_(), level.requires_grad_())
    )


@pytest.mark.parametrize("level_floats", [0, 1 << 27])
def test_what_a_gpu_does_is_the_same(monkeypatch, level_floats):
    """One product with the whole level, and the gather."""
    monkeypatch.setattr(module, "LEVEL_FLOATS", level_floats)
    query, level, first, count = material()
    assert torch.allclose(module.on_gpu(query, level, first, count, WIDTH), by_hand(query, level, first, count))


@pytest.mark.parametrize("kind", ["cosine", "dot"])
def test_a_step_with_the_table_is_the_step_without(kind):
    torch.manual_seed(0)
    trie = tiny_trie(60, 4, seed=1)
    device_trie = DeviceTrie(trie)
    head = ChildHead(device_trie, 6, node_means(trie, torch.randn(60, 5)), kind, 0.3)
    items = torch.randint(60, (16,))
    hidden = torch.randn(16, trie.max_depth, 6)
    path, depth = device_trie.item_path[items], device_trie.depth[items]
    found = []
    for table in (head.table(16), None):
        head.zero_grad()
        losses = []
        for level in range(trie.max_depth):  # without: the gather of each level, as search does it
            here = depth > level
            node = path[here, level]
            parent = device_trie.parent[node]
            logits = head(hidden[here, level], parent, level, table)
            losses.append(torch.nn.functional.cross_entropy(logits, node - device_trie.first_child[parent]))
        torch.stack(losses).sum().backward()
        found.append((torch.stack(losses).detach(), head.nodes.weight.grad, head.query.weight.grad))
    for with_table, without in zip(*found):
        torch.testing.assert_close(with_table, without)
    assert head.table(1 << 20) is not None
    assert head.table(0) is None
    losses = code_losses(head, device_trie, hidden, path, depth, 0.1)
    assert all(torch.isfinite(loss) for loss in losses)


def test_blocked_softmax_is_the_full_one():
    torch.manual_seed(0)
    query, table = torch.randn(7, 4, dtype=torch.float64), torch.randn(23, 4, dtype=torch.float64)
    targets = torch.randint(23, (7,))
    full = full_softmax(query @ table.T * 3.0, targets)
    for block in (1, 5, 23, 100):
        assert torch.allclose(blocked_softmax(query, table, targets, 3.0, block), full)
    torch.autograd.gradcheck(
        lambda q, t: blocked_softmax(q, t, targets, 3.0, 5), (query.requires_grad_(), table.requires_grad_())
    )
