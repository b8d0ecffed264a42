"""Transformer layers against PyTorch's own with the same weights, and the decoder's cache against a full pass."""

from __future__ import annotations

import pytest
import torch

from genrec_dist.generator.attention import Attention
from genrec_dist.generator.transformer import DecoderLayer, EncoderLayer
from genrec_dist.testing.parity import reference_attention, reference_decoder_layer, reference_encoder_layer
from genrec_dist.testing.tiny import randomise

torch.set_num_threads(1)
BATCH, SOURCE, TARGET, DIM, HEADS = 3, 7, 5, 12, 3
MASK = torch.arange(SOURCE) < torch.tensor([7, 3, 1])[:, None]  # right padding of different lengths


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def decoder() -> DecoderLayer:
    torch.manual_seed(3)
    layer = DecoderLayer(DIM, HEADS, 2, 0.0).eval()
    randomise(layer, 0.4)
    return layer


def test_attention_with_padding():
    torch.manual_seed(1)
    attention = Attention(DIM, HEADS).eval()
    randomise(attention, 0.5)
    query, source = draw(BATCH, TARGET, DIM), draw(BATCH, SOURCE, DIM, seed=1)
    own = attention(query, attention.project(source), MASK[:, None, None])
    expected, _ = reference_attention(attention)(query, source, source, key_padding_mask=~MASK)
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


def test_causal_attention():
    torch.manual_seed(1)
    attention = Attention(DIM, HEADS).eval()
    randomise(attention, 0.5)
    x = draw(BATCH, TARGET, DIM)
    own = attention(x, attention.project(x), causal=True)
    future = torch.ones(TARGET, TARGET, dtype=torch.bool).triu(1)
    expected, _ = reference_attention(attention)(x, x, x, attn_mask=future)
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


def test_encoder_layer_with_padding():
    torch.manual_seed(2)
    layer = EncoderLayer(DIM, HEADS, 2, 0.0).eval()
    randomise(layer, 0.4)
    x = draw(BATCH, SOURCE, DIM)
    own = sum(layer(x, None, MASK[:, None, None]))
    expected = reference_encoder_layer(layer)(x, src_key_padding_mask=~MASK)
    torch.testing.assert_close(own[MASK], expected[MASK], atol=1e-5, rtol=1e-5)


def test_decoder_layer_with_padded_memory(decoder):
    x, memory = draw(BATCH, TARGET, DIM), draw(BATCH, SOURCE, DIM, seed=1)
    own = sum(decoder(x, None, memory, MASK[:, None, None]))
    expected = reference_decoder_layer(decoder)(
        x,
        memory,
        tgt_mask=torch.ones(TARGET, TARGET, dtype=torch.bool).triu(1),
        memory_key_padding_mask=~MASK,
    )
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pieces", [[1] * TARGET, [2, 3], [3, 1, 1]])
def test_cached_decoding_equals_the_full_pass(decoder, pieces):
    x = draw(BATCH, TARGET, DIM)
    source = draw(BATCH, SOURCE, DIM, seed=1)
    full = sum(decoder(x, None, source, MASK[:, None, None]))
    memory, cache, parts = decoder.cross_attention.project(source), None, []
    for piece in x.split(pieces, 1):
        out, cache = decoder.extend(piece, memory, MASK[:, None, None], cache)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=1e-5)
    assert [part.shape[2] for part in cache] == [TARGET, TARGET]


@pytest.mark.parametrize("length", [1, 3])
def test_beams_share_the_memory_of_their_user(decoder, length):
    beams = 4
    x, source = draw(BATCH * beams, length, DIM), draw(BATCH, SOURCE, DIM, seed=1)
    shared, _ = decoder.extend(x, decoder.cross_attention.project(source), MASK[:, None, None], beams=beams)
    copied, _ = decoder.extend(
        x,
        decoder.cross_attention.project(source.repeat_interleave(beams, 0)),
        MASK.repeat_interleave(beams, 0)[:, None, None],
    )
    torch.testing.assert_close(shared, copied, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_only():
    torch.manual_seed(4)
    layer = EncoderLayer(DIM, HEADS, 2, 0.5)
    x = draw(BATCH, SOURCE, DIM)
    first, again = layer(x, None, None), layer(x, None, None)
    assert not torch.equal(sum(first), sum(again))
    layer.eval()
    first, again = layer(x, None, None), layer(x, None, None)
    assert torch.equal(sum(first), sum(again))
