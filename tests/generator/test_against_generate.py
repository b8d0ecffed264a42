"""Beam search beside transformers' `generate` with `prefix_allowed_tokens_fn`: one T5, the same lists."""

from __future__ import annotations

import pytest
import torch

from genrec_dist.generator.beam import beam_search, exact_log_probabilities
from genrec_dist.testing.t5 import AllowedTokens, T5Codes, generate_items
from genrec_dist.testing.tiny import tiny_histories, tiny_trie

torch.set_num_threads(1)
SHAPE = {"dim": 8, "num_heads": 2, "num_decoder_layers": 2, "max_history": 6}


@pytest.mark.parametrize(("num_codes", "depth"), [(8, 2), (4, 3), (40, 1)])
@pytest.mark.parametrize("static", [False, True])
def test_same_lists_as_transformers(num_codes, depth, static):
    trie = tiny_trie(40, num_codes, depth=depth)
    model = T5Codes(trie, **SHAPE, spread=0.5)
    history, mask = tiny_histories(5, 40, 6)
    allowed = AllowedTokens(trie)
    for width in (1, 4, 12):
        items, _, _ = beam_search(model, history, mask, width, static=static)
        assert torch.equal(items, generate_items(model, trie, allowed, history, mask, width))
    assert allowed.num_calls > 0


def test_the_adapter_computes_what_t5_computes():
    """Log-probabilities of all items, beside T5's own forward over whole sequences, a softmax over allowed tokens."""
    trie = tiny_trie(30, 5, depth=3)
    model = T5Codes(trie, **SHAPE, spread=0.5)
    history, mask = tiny_histories(3, 30, 6)
    found = exact_log_probabilities(model, history, mask)
    tokens, kept = model.source(history, mask)
    allowed = AllowedTokens(trie)
    expected = torch.zeros(3, 30)
    for item in range(30):
        labels = model.tokens_of(model.trie.item_path[item])
        inputs = torch.cat([torch.zeros(1, dtype=torch.int64), labels[:-1]]).expand(3, -1)
        with torch.no_grad():
            logits = model.t5(input_ids=tokens, attention_mask=kept.long(), decoder_input_ids=inputs).logits
        for place, label in enumerate(labels.tolist()):
            below = allowed(0, inputs[0, : place + 1])
            expected[:, item] += logits[:, place, below].log_softmax(1)[:, below.index(label)]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found.std(1).min() > 0.1


def test_trees_of_several_depths_are_refused():
    with pytest.raises(ValueError, match="expected one depth"):
        T5Codes(tiny_trie(20, 3, seed=1), **SHAPE)
