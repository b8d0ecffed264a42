"""A T5 of transformers that generates item codes, for `generate` and for the project's own beam search alike.

The reference for beam search: transformers' own, held to the tree by `prefix_allowed_tokens_fn`. Vocabulary: padding,
end (never allowed), then the K codes of each level. Trees of one depth only: `generate` compares unfinished sequences.
Not for training.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration

from genrec_dist.generator.attention import KeyValue
from genrec_dist.generator.heads import DeviceTrie, PerLevelHead
from genrec_dist.identifiers.trie import Trie

FIRST_CODE = 2
"""Token of code 0 of the first level."""


class T5Codes(nn.Module):
    """The T5 behind the `CodeGenerator` protocol: its weights and formulas, keys of a user shared by the beams.

    Args:
        trie: all items at one depth.
        dim, num_heads, num_encoder_layers, num_decoder_layers, ffn_multiplier: shape.
        max_history: items of a history at most.
        spread: standard deviation of all weights; 0 leaves transformers' own start.
        seed: of the weights.

    Raises:
        ValueError: items at different depths.
    """

    dense_token: Literal["none", "start", "end"] = "none"

    def __init__(
        self,
        trie: Trie,
        *,
        dim: int = 128,
        num_heads: int = 4,
        num_encoder_layers: int = 1,
        num_decoder_layers: int = 4,
        ffn_multiplier: int = 4,
        max_history: int = 20,
        spread: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(set(trie.depth.tolist())) > 1:
            raise ValueError(f"items at depths {sorted(set(trie.depth.tolist()))}, expected one depth")
        self.trie, self.max_history = DeviceTrie(trie), max_history
        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "vocab_size": FIRST_CODE + trie.max_depth * trie.num_codes,
            "d_model": dim,
            "d_kv": dim // num_heads,
            "d_ff": ffn_multiplier * dim,
            "num_layers": num_encoder_layers,
            "num_decoder_layers": num_decoder_layers,
            "num_heads": num_heads,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }
        config = T5Config(**settings)
        self.t5 = T5ForConditionalGeneration(config).eval()
        if spread:
            for name, parameter in self.t5.named_parameters():
                if "layer_norm" not in name:
                    nn.init.normal_(parameter, std=spread)
        self.head = PerLevelHead(self.trie, dim)
        rows = self.t5.lm_head.weight[FIRST_CODE:].view(trie.max_depth, trie.num_codes, dim)
        with torch.no_grad():
            for level, weight in zip(self.head.levels, rows):
                linear = cast(nn.Linear, level)
                linear.weight.copy_(weight)
                linear.bias.zero_()
        self.eval()

    def tokens_of(self, nodes: torch.Tensor) -> torch.Tensor:
        """Token of each node."""
        return FIRST_CODE + (self.trie.level[nodes] - 1) * self.trie.num_codes + self.trie.code[nodes]

    def source(self, history: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder tokens and their mask, (B, S L)."""
        tokens = self.tokens_of(self.trie.item_path[history])
        kept = mask[..., None].expand_as(tokens).flatten(1)
        return tokens.flatten(1) * kept, kept

    # CodeGenerator

    reads_times = False

    def begin(
        self, history: torch.Tensor, mask: torch.Tensor, times: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any, list[KeyValue]]:
        tokens, kept = self.source(history, mask)
        encoded = self.t5.encoder(input_ids=tokens, attention_mask=kept).last_hidden_state
        keys = []
        for block in self.t5.decoder.block:
            attention = block.layer[1].EncDecAttention
            keys.append((self._heads(attention.k(encoded)), self._heads(attention.v(encoded))))
        memory = (keys, kept[:, None, None])
        start = self.t5.shared(torch.zeros(len(history), 1, dtype=torch.int64, device=history.device))
        hidden, cache = self.decode(start, memory)
        return hidden, memory, cache

    def start_tokens(self, batch: int) -> torch.Tensor:
        return self.t5.shared(torch.zeros(batch, 1, dtype=torch.int64, device=self.t5.shared.weight.device))

    def path_tokens(self, nodes: torch.Tensor, first_level: int = 1) -> torch.Tensor:
        return self.t5.shared(self.tokens_of(nodes))

    def decode(
        self, x: torch.Tensor, memory: Any, cache: list[KeyValue] | None = None, beams: int = 1
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        keys, kept = memory
        grown, blocks = [], self.t5.decoder.block
        batch, length, dim = x.shape
        before = cache[0][0].shape[2] if cache is not None else 0
        bias = self._bias(length, before)
        for i, block in enumerate(blocks):
            attention, normed = block.layer[0].SelfAttention, block.layer[0].layer_norm(x)
            key, value = self._heads(attention.k(normed)), self._heads(attention.v(normed))
            if cache is not None:
                key, value = torch.cat([cache[i][0], key], 2), torch.cat([cache[i][1], value], 2)
            grown.append((key, value))
            out = F.scaled_dot_product_attention(self._heads(attention.q(normed)), key, value, bias, scale=1.0)
            x = x + attention.o(out.transpose(1, 2).reshape(batch, length, dim))
            crossed, normed = block.layer[1].EncDecAttention, block.layer[1].layer_norm(x)
            query = self._heads(crossed.q(normed).view(batch // beams, beams * length, dim))
            out = F.scaled_dot_product_attention(query, keys[i][0], keys[i][1], kept, scale=1.0)
            x = x + crossed.o(out.transpose(1, 2).reshape(batch, length, dim))
            x = block.layer[2](x)
        return self.t5.decoder.final_layer_norm(x), grown

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.t5.config.num_heads, -1)).transpose(1, 2)

    def _bias(self, length: int, before: int) -> torch.Tensor:
        """Relative positions of the last `length` places and all before them, with the causal mask, (1, H, Q, T)."""
        attention = self.t5.decoder.block[0].layer[0].SelfAttention
        table = attention.relative_attention_bias.weight
        place = torch.arange(before + length, device=table.device)
        relative = place[None] - place[before:, None]
        bucket = attention._relative_position_bucket(
            relative,
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        bias = table[bucket].permute(2, 0, 1)[None]
        return bias.masked_fill(relative > 0, float("-inf"))


class AllowedTokens:
    """`prefix_allowed_tokens_fn` of a tree: the tokens of the children of the node that a sequence has come to."""

    def __init__(self, trie: Trie) -> None:
        self.next: dict[tuple[int, ...], list[int]] = {}
        for codes in trie.codes.tolist():
            tokens = [FIRST_CODE + level * trie.num_codes + code for level, code in enumerate(codes)]
            for level, token in enumerate(tokens):
                below = self.next.setdefault(tuple(tokens[:level]), [])
                if token not in below:
                    below.append(token)
        self.num_calls = 0

    def __call__(self, batch: int, sequence: torch.Tensor) -> list[int]:
        self.num_calls += 1
        return self.next[tuple(sequence.tolist()[1:])]


def generate_items(
    model: T5Codes, trie: Trie, allowed: AllowedTokens, history: torch.Tensor, mask: torch.Tensor, width: int
) -> torch.Tensor:
    """Items by transformers' `generate`, best first, (B, W) int64; W is `width` or the number of items."""
    tokens, kept = model.source(history, mask)
    # The cache that `generate` would make has as many layers as the encoder, transformers 5.
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    found = model.t5.generate(
        input_ids=tokens,
        attention_mask=kept.long(),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=trie.max_depth,
        min_new_tokens=trie.max_depth,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        renormalize_logits=True,
        prefix_allowed_tokens_fn=allowed,
        past_key_values=cache,
    )
    levels = np.arange(trie.max_depth) * trie.num_codes + FIRST_CODE
    items = trie.find(found[:, 1:].numpy() - levels)
    return torch.from_numpy(items.astype(np.int64)).view(len(history), width)
