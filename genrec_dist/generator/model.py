"""PRORec Stage II: encoder over the history, decoder over item codes, distillation token. Single device.

Decoder input: [BOS, c_1, ..., c_L, DIS] (`distill_position: end`, as the paper has it) or [DIS, BOS, c_1, ...]
(`start`: the token sees only the user). The state at BOS predicts c_1, at c_1 predicts c_2, and so on.

Shape legend: B batch, S source length, T decoder length, D width, L code length, N items.
Source: PRORec section 3.4, equations 6 to 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from genrec_dist.collaborative.backbones import TimeEncoding, hide_items, history_of, recency
from genrec_dist.collaborative.losses import (
    at_least_float32,
    blocked_softmax,
    sampled_softmax,
    scale_of,
    similarity,
)
from genrec_dist.config import GeneratorConfig
from genrec_dist.generator.attention import KeyValue
from genrec_dist.generator.heads import (
    ChildHead,
    DeviceTrie,
    Head,
    PerLevelHead,
    RatedEmbedding,
    code_losses,
    item_nats,
    node_means,
)
from genrec_dist.generator.soft_codes import SoftCodes
from genrec_dist.generator.transformer import (
    AddNorm,
    DecoderLayer,
    EncoderLayer,
    init_weights,
    scale_residuals,
)
from genrec_dist.identifiers.trie import Trie

Memory = tuple[list[KeyValue], torch.Tensor]
Teacher = Callable[..., torch.Tensor]
"""History, mask and, if it reads them, times (B, S) -> probability of every item (B, N) float32."""
CATALOG_LOGITS = 1 << 28
"""Numbers over the catalog that a batch has at once, at most: the token's logits, a teacher's probabilities."""


class Generator(nn.Module):
    """Encoder-decoder that generates the codes of the next item.

    Args:
        config: generator section.
        trie: codes and tree of all items.
        integrated: Stage I embeddings: encoder input, start of the node embeddings, distillation targets.
        span: first and last time of the train parts, where times are read.

    Shapes:
        integrated: (num_items, N) float32.
    """

    integrated: torch.Tensor

    def __init__(
        self, config: GeneratorConfig, trie: Trie, integrated: torch.Tensor, span: tuple[int, int] = (0, 1)
    ) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.trie = DeviceTrie(trie)
        self.register_buffer("integrated", F.normalize(integrated, dim=-1), persistent=False)
        width = integrated.shape[1]
        layer = (dim, config.num_heads, config.ffn_multiplier, config.dropout)

        self.position = nn.Embedding(config.max_history, dim)
        if config.encoder_input == "item":
            self.item_in = nn.Linear(width, dim)
        if config.encoder_input == "codes" or config.head == "per_level":
            self.code_in = nn.Embedding(self.trie.max_depth * self.trie.num_codes, dim)
        self.encoder = nn.ModuleList(EncoderLayer(*layer) for _ in range(config.num_encoder_layers))
        self.encoder_norm = AddNorm(dim)
        self.source_norm = nn.LayerNorm(dim)

        self.bos = nn.Parameter(torch.zeros(dim))
        self.step = nn.Embedding(self.trie.max_depth + 2, dim)
        self.decoder = nn.ModuleList(DecoderLayer(*layer) for _ in range(config.num_decoder_layers))
        self.decoder_norm = AddNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(init_weights)
        nn.init.normal_(self.bos, std=0.02)
        if config.init == "depth_scaled":
            scale_residuals(self.encoder)
            scale_residuals(self.decoder)
        if config.time_bumps:
            self.time = TimeEncoding(dim, config.time_bumps, span)

        if config.encoder_input == "item":
            self.item = RatedEmbedding(self.integrated, config.item_embedding_rate)
        if config.head == "child":
            nodes = node_means(trie, self.integrated)
            self.head: Head = ChildHead(
                self.trie,
                dim,
                nodes,
                config.head_similarity,
                config.head_temperature,
                config.node_embedding_rate,
            )
            self.node_in = nn.Linear(width, dim)
            self.head.query.apply(init_weights)
        else:
            self.head = PerLevelHead(self.trie, dim)
            self.head.apply(init_weights)
        self.teacher: Teacher | None = None
        """Gives labels beside the true ones, in training; set from outside, no part of the model."""
        if config.distill_weight:
            self.dis = nn.Parameter(torch.randn(dim) * 0.02)
            self.dis_out = nn.Linear(dim, width)

    @property
    def max_history(self) -> int:
        """Items of a history at most."""
        return self.config.max_history

    @property
    def reads_times(self) -> bool:
        """Whether histories come with times."""
        return self.config.time_bumps > 0

    @property
    def dense_token(self) -> Literal["none", "start", "end"]:
        """Where the distillation token stands."""
        return self.config.distill_position if self.config.distill_weight else "none"

    # Encoder

    def encode(self, history_BS: torch.Tensor, mask_BS: torch.Tensor, times_BS: torch.Tensor | None = None) -> Memory:
        """For search: keys and values of every decoder layer over the encoded history, and their mask (B, 1, 1, S).

        Args:
            times_BS: seconds of the history's items, for a model that reads times; None: all are the data's last.
        """
        x_BSD, mask = self._encoded(history_BS, mask_BS, times_BS)
        return [cast(DecoderLayer, layer).cross_attention.project(x_BSD) for layer in self.decoder], mask

    def _encoded(
        self, history_BS: torch.Tensor, mask_BS: torch.Tensor, times_BS: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States of the history (B, S, D), and their mask (B, 1, 1, S)."""
        x_BSD, mask_BS = self._source(history_BS, mask_BS, times_BS)
        mask = mask_BS[:, None, None, :]
        x_BSD, branch = self.dropout(self.source_norm(x_BSD)), None
        for layer in self.encoder:
            x_BSD, branch = layer(x_BSD, branch, mask)
        return self.encoder_norm.after(x_BSD, branch, self.config.dropout)[1], mask

    def _source(
        self, history_BS: torch.Tensor, mask_BS: torch.Tensor, times_BS: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        place, hidden = self.position(recency(mask_BS)), self.config.item_dropout
        if self.reads_times:
            place = place + self.time(self.time.latest(history_BS) if times_BS is None else times_BS)
        if self.config.encoder_input == "item":
            return hide_items(self.item_in(self.item(history_BS)), hidden, self.training) + place, mask_BS
        levels = self.trie.max_depth
        tokens = self._code_tokens(self.trie.item_path[history_BS])  # (B, S, L, D)
        tokens = hide_items(tokens.flatten(2), hidden, self.training).view_as(tokens)
        tokens = tokens + place[:, :, None]
        exists = torch.arange(levels, device=mask_BS.device) < self.trie.depth[history_BS][..., None]
        keep = mask_BS[..., None] & exists
        return tokens.flatten(1, 2), keep.flatten(1, 2)

    def _code_tokens(self, nodes: torch.Tensor) -> torch.Tensor:
        """Embedding of the (level, code) of each node, (..., D); the root has none."""
        level = (self.trie.level[nodes] - 1).clamp(min=0)
        return self.code_in(level * self.trie.num_codes + self.trie.code[nodes].clamp(min=0))

    # Decoder

    def node_tokens(self, nodes: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """Decoder input of trie nodes, (..., D)."""
        if isinstance(self.head, ChildHead):
            return self.node_in(
                F.embedding(nodes, table) if table is not None else self.head._unit(self.head.nodes(nodes))
            )
        return self._code_tokens(nodes)

    def decode(
        self,
        x_BTD: torch.Tensor,
        memory: Memory,
        cache: list[KeyValue] | None = None,
        beams: int = 1,
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """For search: decoder states of input embeddings (positions already added), and the grown cache."""
        keys, mask = memory
        grown = []
        for i, layer in enumerate(self.decoder):
            before = cache[i] if cache is not None else None
            x_BTD, own = cast(DecoderLayer, layer).extend(x_BTD, keys[i], mask, before, beams)
            grown.append(own)
        return self.decoder_norm(x_BTD), grown

    def _decoded(self, x_BTD: torch.Tensor, source_BSD: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Decoder states behind the encoder's."""
        x_BTD, branch = self.dropout(x_BTD), None
        for layer in self.decoder:
            x_BTD, branch = layer(x_BTD, branch, source_BSD, mask)
        return self.decoder_norm.after(x_BTD, branch, self.config.dropout)[1]

    def begin(
        self, history_BS: torch.Tensor, mask_BS: torch.Tensor, times_BS: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Memory, list[KeyValue] | None]:
        """States of the start tokens (the last one predicts the first code), memory, cache of the start tokens."""
        memory = self.encode(history_BS, mask_BS, times_BS)
        hidden, cache = self.decode(self.start_tokens(len(history_BS)), memory)
        return hidden, memory, cache

    def start_tokens(self, batch: int) -> torch.Tensor:
        """First decoder inputs, (B, 1 or 2, D): [BOS], or [DIS, BOS] when the token stands at the start."""
        tokens = [self.bos + self._step(0)]
        if self.dense_token == "start":
            tokens.insert(0, self.dis_token())
        return torch.stack(tokens).expand(batch, -1, -1)

    def path_tokens(
        self, nodes_BT: torch.Tensor, first_level: int = 1, table: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decoder inputs of path nodes at levels first_level, first_level + 1, ...; (B, T, D).

        Args:
            table: of a child head, where it is there already.
        """
        levels = torch.arange(first_level, first_level + nodes_BT.shape[1], device=nodes_BT.device)
        return self.node_tokens(nodes_BT, table) + self.step(levels)

    def dis_token(self) -> torch.Tensor:
        """Decoder input of the distillation token, (D,)."""
        return self.dis + self._step(self.trie.max_depth + 1)

    def _step(self, index: int) -> torch.Tensor:
        return self.step(torch.full((), index, dtype=torch.int64, device=self.bos.device))

    def distilled(self, hidden: torch.Tensor) -> torch.Tensor:
        """Query of the distillation token in the space of the integrated embeddings."""
        return self.dis_out(hidden)

    def dense_logits(self, query_BN: torch.Tensor, candidates: torch.Tensor | None = None) -> torch.Tensor:
        """Distillation logits of all items, (B, num_items); or of one item a row, (B,)."""
        scale = scale_of(self.config.distill_similarity, self.config.distill_temperature)
        if candidates is None:
            return similarity(query_BN, self.integrated, self.config.distill_similarity) * scale
        with torch.autocast(query_BN.device.type, enabled=False):
            query = query_BN.float()
            if self.config.distill_similarity == "cosine":
                query = F.normalize(query, dim=-1)
            return (query * self.integrated[candidates]).sum(-1) * scale

    # Training

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """L_gen + beta L_distillation (equation 8).

        Args:
            batch: history, mask (B, S), target (B,), count; times (B, S + 1) where they are read, of which the last
                column, the target's, is not; `distill_negatives` (M,) when they are sampled; `levels`, the longest code
                of the global batch, unless the decoder is to run over all levels. Or `parts`, a list of such batches
                with the count of the whole, whose losses are added.
        """
        parts = batch.get("parts", [batch])
        # By the count, which all workers share: under ZeRO 3 they have to call the same modules.
        table = self.head.table(parts[0]["count"]) if isinstance(self.head, ChildHead) else None
        losses = [self._losses(part, table) for part in parts]
        if len(losses) == 1:
            return losses[0]
        return {name: torch.stack([loss[name] for loss in losses]).sum() for name in losses[0]}

    def target_nats(
        self,
        history_BS: torch.Tensor,
        mask_BS: torch.Tensor,
        target_B: torch.Tensor,
        times_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Negative log-probability of each target given its history, (B,) float32: see `item_nats`.

        One pass with the target's own codes as decoder input; no smoothing, no distillation token's score.
        """
        path_BL, depth_B = self.trie.item_path[target_B], self.trie.depth[target_B]
        start = self.start_tokens(len(target_B))
        x_BTD = torch.cat([start, self.path_tokens(path_BL[:, :-1])], 1)
        hidden = self._decoded(x_BTD, *self._encoded(history_BS, mask_BS, times_BS))
        return item_nats(self.head, self.trie, hidden[:, start.shape[1] - 1 :], path_BL, depth_B)

    def _losses(self, batch: dict, table: torch.Tensor | None) -> dict[str, torch.Tensor]:
        config, target = self.config, batch["target"]
        source_BSD, mask = self._encoded(*history_of(batch))
        levels = batch.get("levels", self.trie.max_depth)
        path_BL, depth_B = self.trie.item_path[target][:, :levels], self.trie.depth[target]
        at_end = self.dense_token == "end"
        # Nothing is read off the state at the last code unless a token stands behind it.
        seen_BL = path_BL if at_end else path_BL[:, :-1]
        inputs = [self.start_tokens(len(target)), self.path_tokens(seen_BL, table=table)]
        x_BTD = torch.cat(inputs, 1)
        if at_end:  # right behind the last code of each item; what follows is invisible to it
            x_BTD = torch.cat([x_BTD, x_BTD.new_zeros(len(target), 1, x_BTD.shape[2])], 1)
            place = (depth_B + 1)[:, None] == torch.arange(x_BTD.shape[1], device=target.device)
            x_BTD = torch.where(place[..., None], self.dis_token().to(x_BTD.dtype), x_BTD)
        hidden = self._decoded(x_BTD, source_BSD, mask)
        bos = inputs[0].shape[1] - 1
        soft = SoftCodes(self.trie, self.teacher(*history_of(batch)), config.teacher_weight) if self.teacher else None
        smoothing = config.label_smoothing
        by_level = code_losses(self.head, self.trie, hidden[:, bos:], path_BL, depth_B, smoothing, table, soft)
        loss_gen = torch.stack(by_level).sum() / batch["count"]
        losses = {"loss": loss_gen, "loss_gen": loss_gen}
        if config.level_decay != 1:
            weighted = [config.level_decay**level * loss for level, loss in enumerate(by_level)]
            losses["loss"] = torch.stack(weighted).sum() / batch["count"]
        if config.distill_weight:
            at = depth_B + 1 if at_end else torch.zeros_like(depth_B)
            query = self.distilled(hidden.gather(1, at[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0])
            losses["loss_distill"] = self._distill_loss(query, target, batch, soft) / batch["count"]
            losses["loss"] = losses["loss"] + config.distill_weight * losses["loss_distill"]
        return losses

    def _distill_loss(
        self, query: torch.Tensor, target: torch.Tensor, batch: dict, soft: SoftCodes | None
    ) -> torch.Tensor:
        """Equation 7, summed: contrast with the target's integrated embedding; and what a teacher says of the catalog,
        where all of it is scored."""
        kind = self.config.distill_similarity
        scale = scale_of(kind, self.config.distill_temperature)
        if "distill_negatives" not in batch:
            if query.shape[0] * len(self.integrated) <= CATALOG_LOGITS:
                logits = self.dense_logits(query)
                hard = F.cross_entropy(logits, target, reduction="sum")
                return hard if soft is None else soft.mixed_items(hard, logits)
            query = at_least_float32(query)
            return blocked_softmax(
                F.normalize(query, dim=-1) if kind == "cosine" else query, self.integrated, target, scale
            )
        negatives = batch["distill_negatives"]
        logits = similarity(query, self.integrated[negatives], kind) * scale
        hit = negatives[None] == target[:, None]
        return sampled_softmax(self.dense_logits(query, target), logits, hit, self.trie.num_items - 1)
