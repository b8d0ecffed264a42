"""The decoder rearranged for search beside the model's own: the same states at every level, with and without ends."""

from __future__ import annotations

import pytest
import torch

from genrec_dist.generator import beam_decoder
from genrec_dist.generator.beam import BeamSearch
from genrec_dist.generator.beam_decoder import ModelDecoder, PreparedDecoder, make_decoder
from genrec_dist.generator.search_tables import SearchTables
from genrec_dist.testing.tiny import tiny_generator, tiny_gpt, tiny_histories, tiny_trie

torch.set_num_threads(1)


class Recorded:
    """A decoder that keeps the states it gave."""

    def __init__(self, inner) -> None:
        self.inner, self.start, self.states = inner, inner.start, []

    def step(self, *arguments):
        hidden, state = self.inner.step(*arguments)
        self.states.append(hidden.clone())
        return hidden, state


@pytest.mark.parametrize("depth", [2, 4, None])
@pytest.mark.parametrize("kind", [{}, {"distill_position": "start"}, {"head": "per_level", "encoder_input": "codes"}])
@pytest.mark.parametrize("at_once", [2, 5, 100])
def test_states_of_every_level(monkeypatch, depth, kind, at_once):
    monkeypatch.setattr(beam_decoder, "USERS_AT_ONCE", at_once)
    trie = tiny_trie(60, 8 if depth else 5, depth=depth, seed=2)
    model = tiny_generator(trie, seed=3, **kind)
    history, mask = tiny_histories(5, 60, 6)
    states = []
    for prepared in (True, False):
        tables = SearchTables(model)
        tables.decoder = Recorded(tables.decoder if prepared else make_decoder(model, tables._tokens, False))
        search = BeamSearch(model, 9, tables, static=False)
        with torch.no_grad():
            beams = search.begin(history, mask)
            for level in range(1, trie.max_depth):
                search.extend(beams, level)
        states.append(tables.decoder.states)
    assert len(states[0]) == len(states[1]) >= (1 if depth == 2 else 3)
    for found, expected in zip(*states):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert expected.std(0).min() > 0.01


def test_who_gets_which():
    trie = tiny_trie(20, 4, depth=3)
    assert isinstance(SearchTables(tiny_generator(trie)).decoder, PreparedDecoder)
    assert isinstance(SearchTables(tiny_gpt(trie)).decoder, ModelDecoder)
    assert isinstance(SearchTables(tiny_generator(tiny_trie(20, 20, depth=1))).decoder, ModelDecoder)
    tables = SearchTables(tiny_generator(trie))
    assert isinstance(make_decoder(tables._model, tables._tokens.to("meta")), ModelDecoder)  # not a CPU
