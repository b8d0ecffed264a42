"""Prepared tables: the same numbers as the model's own functions, and never of other weights."""

from __future__ import annotations

import pytest
import torch

from genrec_dist.generator.beam import beam_search, exact_log_probabilities
from genrec_dist.generator.search_tables import SearchTables
from genrec_dist.testing.tiny import tiny_generator, tiny_gpt, tiny_histories, tiny_trie

torch.set_num_threads(1)
TRIE = tiny_trie(30, 4, seed=3)


@pytest.mark.parametrize("make", [tiny_generator, tiny_gpt])
@pytest.mark.parametrize("head", ["child", "per_level"])
def test_tokens_of_inner_nodes_are_the_models_own(make, head):
    model = make(TRIE, head=head)
    tables, checked = SearchTables(model), 0
    for level in range(1, TRIE.max_depth):
        nodes = torch.arange(*TRIE.level_start[level : level + 2].tolist())
        nodes = nodes[model.trie.num_children[nodes] > 0].reshape(-1, 1)
        with torch.no_grad():
            torch.testing.assert_close(tables.tokens(nodes), model.path_tokens(nodes, level))
        checked += len(nodes)
    assert checked > 3


def test_where_paths_can_have_ended():
    assert [SearchTables(tiny_generator(TRIE)).leaves_above(level) for level in (0, TRIE.max_depth)] == [False, True]
    even = SearchTables(tiny_generator(tiny_trie(30, 4, depth=3)))
    assert [even.leaves_above(level) for level in (1, 2, 3)] == [False, False, True]


@pytest.mark.parametrize("search", [lambda *a, **k: beam_search(*a, 5, **k), exact_log_probabilities])
def test_changed_weights_are_refused(search):
    model = tiny_generator(TRIE)
    history, mask = tiny_histories(3, TRIE.num_items, 5)
    tables = SearchTables(model)
    search(model, history, mask, tables=tables)
    with torch.no_grad():
        model.head.nodes.weight.mul_(1.5)  # as an optimiser does it
    with pytest.raises(RuntimeError, match="make them anew"):
        search(model, history, mask, tables=tables)
    search(model, history, mask, tables=SearchTables(model))
    replaced = SearchTables(model)
    model.bos.data = model.bos.data.clone()
    with pytest.raises(RuntimeError, match="make them anew"):
        search(model, history, mask, tables=replaced)


def test_tables_hold_no_graph_and_leave_the_model_alone():
    model = tiny_generator(TRIE).train()
    before = set(model.state_dict())
    tables = SearchTables(model)
    assert not any(value.requires_grad for value in vars(tables).values() if torch.is_tensor(value))
    assert set(model.state_dict()) == before
