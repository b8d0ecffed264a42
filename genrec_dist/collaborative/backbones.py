"""Sequence backbones over a given item table: DIN with target attention, and SASRec.

A backbone gets the item embedding table at every call, so the same code serves collaborative-only models,
the fused table of PRORec Stage I and the SASRec baseline. Single device; knows no losses.

Shape legend: B batch, L history length, N candidates, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from genrec_dist.generator.transformer import AddNorm, EncoderLayer, init_weights


def recency(mask_BL: torch.Tensor) -> torch.Tensor:
    """Distance of each place from the newest item (newest 0), (B, L) int64; padding gives 0."""
    length = mask_BL.sum(1, keepdim=True)
    return (length - 1 - torch.arange(mask_BL.shape[1], device=mask_BL.device)).clamp(min=0)


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

    Source: Zhou et al. (2018). Deviations: attention weights pass through a softmax, positions count from the
    newest item, output is a matching score instead of a click probability.
    """

    def __init__(self, dim: int, max_history: int, dropout: float, attention: str = "dot", cosine: bool = True):
        super().__init__()
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
        self, table_ND: torch.Tensor, history_BL: torch.Tensor, mask_BL: torch.Tensor, candidates_ND: torch.Tensor
    ) -> torch.Tensor:
        """Matching score of every history with every candidate.

        Shapes:
            table_ND: (num_items, D) item table that the history is looked up in.
            candidates_ND: (N, D) embeddings of the candidates, shared by the batch.
            returns: (B, N); cosines in [-1, 1] when `cosine`.
        """
        states_BLD = self.dropout(self.norm(table_ND[history_BL] + self.position(recency(mask_BL))))
        states_BLD = states_BLD + self.state(states_BLD)
        value_BLD = self.value(states_BLD)
        pooled = self.pool(states_BLD).squeeze(-1).masked_fill(~mask_BL, -1e9).softmax(1)
        pooled_BD = torch.einsum("bl,bld->bd", pooled, states_BLD)
        user_BD = pooled_BD + self.user(pooled_BD)
        candidate_ND = candidates_ND
        if self.cosine:
            value_BLD, user_BD = F.normalize(value_BLD, dim=-1), F.normalize(user_BD, dim=-1)
            candidate_ND = F.normalize(candidate_ND, dim=-1)
        weight_BLN = self._activation(states_BLD, candidates_ND).masked_fill(~mask_BL[..., None], -1e9).softmax(1)
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
        self, dim: int, max_history: int, num_layers: int, num_heads: int, dropout: float, input_norm: bool = False
    ) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(dim) if input_norm else nn.Identity()
        self.position = nn.Embedding(max_history, dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(dim, num_heads, 4, dropout) for _ in range(num_layers))
        self.norm = AddNorm(dim)
        self.apply(init_weights)

    def states(self, table_ND: torch.Tensor, history_BL: torch.Tensor) -> torch.Tensor:
        """User state after each place, (B, L, D). Right padding needs no mask: no real place looks at it."""
        length = history_BL.shape[1]
        x_BLD = table_ND[history_BL] + self.position(torch.arange(length, device=table_ND.device))
        x_BLD, branch = self.dropout(self.input_norm(x_BLD)), None
        for layer in self.layers:
            x_BLD, branch = layer(x_BLD, branch, None, True)
        return self.norm.after(x_BLD, branch, self.dropout.p)[1]

    def user(self, table_ND: torch.Tensor, history_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """State after the newest item, (B, D)."""
        last = (mask_BL.sum(1) - 1).clamp(min=0)
        states = self.states(table_ND, history_BL)
        return states[torch.arange(len(states), device=states.device), last]
