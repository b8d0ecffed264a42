"""CSJ-ID generator: a decoder-only Transformer over the codes of the history. Single device.

Sequence: [BOS, codes of item 1, codes of item 2, ...], every item L codes long; a level past an item's depth holds
the PAD code of that level, which is seen and never predicted. The state before a code predicts it, at every place.
Token = embedding of (level, code) + embedding of the level + embedding of the item's place, counted from the oldest.

Shape legend: B batch, S history length, T tokens, D width, L code length, n items.
Source: CSJ-ID section 3.3. Not in the paper: embeddings of levels and places, label smoothing, the child head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import nn

from genrec_dist.config import GptConfig
from genrec_dist.generator.attention import KeyValue
from genrec_dist.generator.heads import ChildHead, DeviceTrie, Head, PerLevelHead, code_losses, item_nats, node_means
from genrec_dist.generator.transformer import AddNorm, CausalLayer, init_weights, scale_residuals
from genrec_dist.identifiers.trie import Trie


class Prefix(NamedTuple):
    """What the next item's codes see of a user: keys and values of each layer, once a user however many beams.

    Shapes:
        keys: (B, H, 1 + S L, E) keys and values, one pair a layer.
        mask: (B, 1, 1, 1 + S L) bool, True at BOS and at codes of real items.
        place: (B,) int64 place of the next item.
    """

    keys: list[KeyValue]
    mask: torch.Tensor
    place: torch.Tensor


class GptGenerator(nn.Module):
    """Decoder-only model that generates the codes of the next item.

    Args:
        config: gpt section.
        trie: codes and tree of all items.
        table: embeddings that the node embeddings of the child head start from; None with head 'per_level'.

    Shapes:
        table: (num_items, N) float32.

    Raises:
        ValueError: head 'child' without a table of all items.
    """

    dense_token: Literal["none", "start", "end"] = "none"

    def __init__(self, config: GptConfig, trie: Trie, table: torch.Tensor | None = None) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.trie = DeviceTrie(trie)
        levels = self.trie.max_depth
        self.code_in = nn.Embedding(levels * (self.trie.num_codes + 1), dim)
        self.level_in = nn.Embedding(levels, dim)
        self.position = nn.Embedding(config.max_history + 1, dim)
        self.bos = nn.Parameter(torch.zeros(dim))
        self.layers = nn.ModuleList(
            CausalLayer(dim, config.num_heads, config.ffn_multiplier, config.dropout) for _ in range(config.num_layers)
        )
        self.norm = AddNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(init_weights)
        nn.init.normal_(self.bos, std=0.02)
        if config.init == "depth_scaled":
            scale_residuals(self.layers)
        self.head = self._make_head(trie, table)

    def _make_head(self, trie: Trie, table: torch.Tensor | None) -> Head:
        config = self.config
        if config.head == "per_level":
            head = PerLevelHead(self.trie, config.dim)
            head.apply(init_weights)
            return head
        if table is None or len(table) != trie.num_items:
            got = "no table" if table is None else f"a table of {len(table)} items"
            raise ValueError(f"head 'child' needs embeddings of {trie.num_items} items, got {got}")
        child = ChildHead(
            self.trie, config.dim, node_means(trie, table), config.head_similarity, config.head_temperature
        )
        init_weights(child.query)
        return child

    @property
    def max_history(self) -> int:
        """Items of a history at most."""
        return self.config.max_history

    # Tokens

    def path_tokens(self, nodes: torch.Tensor, first_level: int = 1) -> torch.Tensor:
        """Tokens of path nodes at levels first_level, first_level + 1, ..., without a place.

        A node that ends above its level, as item paths repeat their leaf, gives the PAD code of the level.

        Shapes:
            nodes: (..., T) int64. Returns (..., T, D).
        """
        trie = self.trie
        level = torch.arange(first_level, first_level + nodes.shape[-1], device=nodes.device)
        code = torch.where(trie.level[nodes] == level, trie.code[nodes], trie.num_codes)
        return self.code_in((level - 1) * (trie.num_codes + 1) + code) + self.level_in(level - 1)

    def start_tokens(self, batch: int) -> torch.Tensor:
        """None, (B, 0, D): the prefix holds BOS."""
        return self.bos.new_zeros(batch, 0, self.config.dim)

    def _sequence(self, items_Bn: torch.Tensor) -> torch.Tensor:
        """BOS and the codes of the items, (B, 1 + n L, D)."""
        place = self.position(torch.arange(items_Bn.shape[1], device=items_Bn.device))
        tokens = self.path_tokens(self.trie.item_path[items_Bn]) + place[:, None]
        return torch.cat([self.bos.expand(len(items_Bn), 1, -1), tokens.flatten(1, 2)], 1)

    # Training

    def states(self, items_Bn: torch.Tensor) -> torch.Tensor:
        """State that predicts each code of each item, (B, n, L, D): it sees BOS and all codes before."""
        x_BTD, branch = self.dropout(self._sequence(items_Bn)[:, :-1]), None
        for layer in self.layers:
            x_BTD, branch = layer(x_BTD, branch)
        return self.norm.after(x_BTD, branch, self.config.dropout)[1].unflatten(
            1, (items_Bn.shape[1], self.trie.max_depth)
        )

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Cross-entropy of every code of every item of the windows, first items included.

        Args:
            batch: history, targets (B, S) int64 and mask (B, S) bool, right-padded; count, targets of the global batch
                over the number of workers. The items of a row are history[0], targets. `rows`, a number: places of the
                loss on a worker with padding, the same on all workers; where there is none, the count is taken.

        Returns:
            loss, and of it (detached) loss_level_1, loss_level_2, ...
        """
        mask = batch["mask"]
        items = torch.cat([batch["history"][:, :1], batch["targets"]], 1)
        valid = torch.cat([mask[:, :1], mask], 1)
        hidden = self.states(items)
        if hidden.is_cuda:  # rows of padding cost less than waiting for the number of the others
            hidden, item = hidden.flatten(0, 1), items.flatten()
            depth = self.trie.depth[item] * valid.flatten()
        else:
            hidden, item = hidden[valid], items[valid]
            depth = self.trie.depth[item]
        path = self.trie.item_path[item]
        table = self.head.table(batch.get("rows", batch["count"])) if isinstance(self.head, ChildHead) else None
        losses = code_losses(self.head, self.trie, hidden, path, depth, self.config.label_smoothing, table)
        total = torch.stack(losses).sum() / batch["count"]
        by_level = {f"loss_level_{level}": loss.detach() / batch["count"] for level, loss in enumerate(losses, 1)}
        return {"loss": total} | by_level

    def target_nats(self, history_BS: torch.Tensor, mask_BS: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
        """Negative log-probability of each target given its history, (B,) float32: see `item_nats`."""
        place, row = mask_BS.sum(1), torch.arange(len(target_B), device=target_B.device)
        items = torch.cat([history_BS, torch.zeros_like(target_B)[:, None]], 1)
        items[row, place] = target_B
        path_BL, depth_B = self.trie.item_path[target_B], self.trie.depth[target_B]
        return item_nats(self.head, self.trie, self.states(items)[row, place], path_BL, depth_B)

    # Search

    reads_times = False

    def begin(
        self, history_BS: torch.Tensor, mask_BS: torch.Tensor, times_BS: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Prefix, None]:
        """Run the histories once: state that predicts the next item's first code (B, 1, D), and the prefix.

        Shapes:
            history_BS: (B, S) int64, right-padded; a row may be empty. mask_BS: (B, S) bool.
        """
        x_BTD, keys = self._sequence(history_BS), []
        for layer in self.layers:
            x_BTD, own = cast(CausalLayer, layer).begin(x_BTD)
            keys.append(own)
        num_items = mask_BS.sum(1)
        newest = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), num_items * self.trie.max_depth]
        seen = mask_BS.repeat_interleave(self.trie.max_depth, 1)
        seen = torch.cat([seen.new_ones(len(seen), 1), seen], 1)
        return self.norm(newest)[:, None], Prefix(keys, seen[:, None, None], num_items), None

    def decode(
        self, x_BTD: torch.Tensor, memory: Prefix, cache: list[KeyValue] | None = None, beams: int = 1
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """States of the next item's tokens behind the prefix, and the grown cache of these tokens.

        Args:
            x_BTD: from `path_tokens`; the batch is users x beams, beams of a user consecutive.
        """
        place = self.position(memory.place)[:, None, None]
        x_BTD = (x_BTD.unflatten(0, (-1, beams)) + place).flatten(0, 1)
        grown = []
        for i, layer in enumerate(self.layers):
            before = cache[i] if cache is not None else None
            x_BTD, own = cast(CausalLayer, layer).extend(x_BTD, memory.keys[i], memory.mask, before, beams)
            grown.append(own)
        return self.norm(x_BTD), grown
