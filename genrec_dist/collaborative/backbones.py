"""Sequence backbones over a given item table: DIN with target attention, and SASRec.

A backbone gets the item embedding table at every call, so the same code serves collaborative-only models,
the fused table of PRORec Stage I and the SASRec baseline. Single device.

Shape legend: B batch, L history length, N candidates, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from genrec_dist.catalog.dataset import NO_TIMESTAMP
from genrec_dist.collaborative.losses import at_least_float32
from genrec_dist.generator.transformer import AddNorm, EncoderLayer, init_weights


def recency(mask_BL: torch.Tensor) -> torch.Tensor:
    """Distance of each place from the newest item (newest 0), (B, L) int64; padding gives 0."""
    length = mask_BL.sum(1, keepdim=True)
    return (length - 1 - torch.arange(mask_BL.shape[1], device=mask_BL.device)).clamp(min=0)


class TimeEncoding(nn.Module):
    """When an item of the history was met, as a vector that is added to the item's: Gaussian bumps along the time of
    the data, and a linear layer that starts at zero.

    Items come and go: who bought something last month is likely to buy what is sold today. Only times of the history
    are read, never the target's.

    Args:
        dim: D.
        num_bumps: spread over the time of the data; each is as wide as the distance to the next.
        span: first and last time of the train parts, seconds. It is a buffer: a trained model brings its own.
    """

    span: torch.Tensor

    def __init__(self, dim: int, num_bumps: int, span: tuple[int, int]) -> None:
        super().__init__()
        self.num_bumps = num_bumps
        self.register_buffer("span", torch.tensor(span, dtype=torch.int64))
        self.linear = nn.Linear(num_bumps, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, times_BL: torch.Tensor) -> torch.Tensor:
        """(B, L) int64 seconds, NO_TIMESTAMP where unknown -> (B, L, D); unknown times give the bias alone."""
        first, last = self.span[0], self.span[1]
        known = times_BL != NO_TIMESTAMP
        since = (times_BL.where(known, first) - first).double() / (last - first).clamp(min=1)
        since = since.clamp(0, 1)  # what came later than the train parts is as their end
        place = since.float()[..., None] * (self.num_bumps - 1)
        bumps = torch.exp(-0.5 * (place - torch.arange(self.num_bumps, device=place.device)) ** 2)
        return self.linear(bumps * known[..., None])

    def latest(self, like: torch.Tensor) -> torch.Tensor:
        """The last time of the training data for each place, for histories that come without times."""
        return self.span[1].expand(like.shape)


def history_of(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """History and mask of a batch, and the times of the history (not the target's) where it holds times."""
    times = batch.get("times")
    return batch["history"], batch["mask"], *(() if times is None else (times[:, :-1],))


def hide_items(rows_BLD: torch.Tensor, share: float, training: bool) -> torch.Tensor:
    """Zeros in place of some items of each history, in training only."""
    if not training or not share:
        return rows_BLD
    keep = torch.rand(rows_BLD.shape[:2], device=rows_BLD.device) >= share
    return rows_BLD * keep[..., None]


class Din(nn.Module):
    """Deep Interest Network: the user's interest depends on the candidate.

    a_l(n) = softmax over the history of the activation unit of (history item l, candidate n); the score is
    sum_l a_l(n) v_l . e_n plus the dot product of a candidate-independent user vector. Dot-product activation
    lets the whole catalog be scored by two matrix products.

    Args:
        dim: D.
        max_history: L at most.
        dropout: on history states.
        attention: 'dot' (bilinear) or 'mlp' (the activation unit of the paper: [k, q, k - q, k * q] -> MLP).
        cosine: normalise values and candidates, so that scores are weighted means of cosines.
        item_dropout: share of the history's items that training hides.

    Source: Zhou et al. (2018). Deviations: attention weights pass through a softmax, positions count from the
    newest item, output is a matching score instead of a click probability.
    """

    def __init__(
        self,
        dim: int,
        max_history: int,
        dropout: float,
        attention: str = "dot",
        cosine: bool = True,
        item_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.item_dropout = item_dropout
        self.attention_kind, self.cosine = attention, cosine
        self.position = nn.Embedding(max_history, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.state = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Dropout(dropout))
        if attention == "dot":
            self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.pool = nn.Linear(dim, 1)
        self.user = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim))
        self.mix = nn.Parameter(torch.zeros(1))  # one element, not a scalar: DeepSpeed cannot broadcast 0-d
        if attention == "mlp":
            self.unit = nn.Sequential(nn.Linear(4 * dim, 36), nn.PReLU(), nn.Linear(36, 1))
        self.apply(init_weights)

    def scores(
        self,
        table_ND: torch.Tensor,
        history_BL: torch.Tensor,
        mask_BL: torch.Tensor,
        candidates_ND: torch.Tensor,
        beside_BLD: torch.Tensor | float = 0.0,
    ) -> torch.Tensor:
        """Matching score of every history with every candidate.

        Args:
            beside_BLD: what is added to the items of the history.

        Shapes:
            table_ND: (num_items, D) item table that the history is looked up in.
            candidates_ND: (N, D) embeddings of the candidates, shared by the batch.
            returns: (B, N); cosines in [-1, 1] when `cosine`.
        """
        rows_BLD = hide_items(F.embedding(history_BL, table_ND), self.item_dropout, self.training)
        states_BLD = self.dropout(self.norm(rows_BLD + self.position(recency(mask_BL)) + beside_BLD))
        states_BLD = states_BLD + self.state(states_BLD)
        value_BLD = self.value(states_BLD)
        pooled = at_least_float32(self.pool(states_BLD).squeeze(-1)).masked_fill(~mask_BL, -1e9).softmax(1)
        pooled_BD = torch.einsum("bl,bld->bd", pooled, states_BLD)
        user_BD = pooled_BD + self.user(pooled_BD)
        candidate_ND = candidates_ND
        if self.cosine:
            value_BLD, user_BD = F.normalize(value_BLD, dim=-1), F.normalize(user_BD, dim=-1)
            candidate_ND = F.normalize(candidate_ND, dim=-1)
        activation_BLN = at_least_float32(self._activation(states_BLD, candidates_ND))
        weight_BLN = activation_BLN.masked_fill(~mask_BL[..., None], -1e9).softmax(1)
        interest_BN = (weight_BLN * (value_BLD @ candidate_ND.T)).sum(1)
        share = torch.sigmoid(self.mix)
        return share * interest_BN + (1 - share) * (user_BD @ candidate_ND.T)

    def _activation(self, states_BLD: torch.Tensor, candidates_ND: torch.Tensor) -> torch.Tensor:
        """Activation unit, (B, L, N)."""
        if self.attention_kind == "dot":
            scale = candidates_ND.shape[1] ** -0.5
            return self.key(states_BLD) @ candidates_ND.T * scale
        key = states_BLD[:, :, None, :]
        query = candidates_ND[None, None]
        shape = torch.broadcast_shapes(key.shape, query.shape)
        joined = torch.cat([key.expand(shape), query.expand(shape), key - query, key * query], -1)
        return self.unit(joined).squeeze(-1)


class SasRec(nn.Module):
    """Causal self-attention over the history; the newest state is the user vector.

    Source: Kang and McAuley (2018). Deviations: pre-norm, GELU, positions count from the oldest item.
    """

    def __init__(
        self,
        dim: int,
        max_history: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        input_norm: bool = False,
        item_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.item_dropout = item_dropout
        self.input_norm = nn.LayerNorm(dim) if input_norm else nn.Identity()
        self.position = nn.Embedding(max_history, dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(dim, num_heads, 4, dropout) for _ in range(num_layers))
        self.norm = AddNorm(dim)
        self.apply(init_weights)

    def states(
        self, table_ND: torch.Tensor, history_BL: torch.Tensor, beside_BLD: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """User state after each place, (B, L, D). Right padding needs no mask: no real place looks at it.

        Args:
            beside_BLD: what is added to the items of the history.
        """
        length = history_BL.shape[1]
        rows_BLD = hide_items(F.embedding(history_BL, table_ND), self.item_dropout, self.training)
        x_BLD = rows_BLD + self.position(torch.arange(length, device=table_ND.device)) + beside_BLD
        x_BLD, branch = self.dropout(self.input_norm(x_BLD)), None
        for layer in self.layers:
            x_BLD, branch = layer(x_BLD, branch, None, True)
        return self.norm.after(x_BLD, branch, self.dropout.p)[1]

    def user(
        self,
        table_ND: torch.Tensor,
        history_BL: torch.Tensor,
        mask_BL: torch.Tensor,
        beside_BLD: torch.Tensor | float = 0.0,
    ) -> torch.Tensor:
        """State after the newest item, (B, D)."""
        last = (mask_BL.sum(1) - 1).clamp(min=0)
        states = self.states(table_ND, history_BL, beside_BLD)
        return states[torch.arange(len(states), device=states.device), last]
