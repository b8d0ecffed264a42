"""Multi-head attention on one device: training passes with fused kernels, and search behind a shared prefix.

Shape legend: B batch, Q query length, S source length, T own length, W beams, D width, H heads, E width of a head.
Source: Vaswani et al. (2017).
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

KeyValue = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """Multi-head scaled dot-product attention.

    Args:
        dim: D, a multiple of `num_heads`.
        num_heads: H.
        dropout: of the attention weights, in training.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def project(self, source_BSD: torch.Tensor) -> KeyValue:
        """Keys and values, each (B, H, S, E)."""
        batch, length, dim = source_BSD.shape
        both = self.key_value(source_BSD).view(batch, length, 2, self.num_heads, dim // self.num_heads)
        key, value = both.permute(2, 0, 3, 1, 4)
        return key, value

    def own(self, source_BSD: torch.Tensor) -> KeyValue | torch.Tensor:
        """Keys and values for a training pass: as `project`, or (B, S, 2, H, E) for the kernels of short sequences."""
        batch, length, dim = source_BSD.shape
        width = dim // self.num_heads
        if runs_fused(source_BSD) and _short(length, width):
            return self.key_value(source_BSD).view(batch, length, 2, self.num_heads, width)
        return self.project(source_BSD)

    def forward(
        self,
        query_BQD: torch.Tensor,
        key_value: KeyValue | torch.Tensor,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """Attend from the queries to projected keys and values.

        Args:
            key_value: from `project`, or from `own` with a mask of keys alone.
            causal: the queries are the last places of the keys, and each sees itself and those before it.

        Shapes:
            query_BQD: (B, Q, D).
            mask: bool, True where attention is allowed, broadcastable to (B, H, Q, S).
            returns: (B, Q, D).
        """
        batch, length, dim = query_BQD.shape
        query = self.query(query_BQD).view(batch, length, self.num_heads, dim // self.num_heads).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        if isinstance(key_value, torch.Tensor):
            from genrec_dist.generator.attention_triton import short_attention

            out = short_attention(query, key_value, None if mask is None else mask[:, 0, 0], causal, dropout)
            return self.out(out.reshape(batch, length, dim))
        key, value = key_value
        if causal and length != key.shape[2]:  # torch would let the first query stand at the first key
            mask, causal = _causal_mask(length, key.shape[2], query.device), False
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal and length > 1
        )
        return self.out(out.transpose(1, 2).reshape(batch, length, dim))

    def behind(
        self, query_BQD: torch.Tensor, prefix: KeyValue, prefix_mask: torch.Tensor, own: KeyValue, beams: int
    ) -> torch.Tensor:
        """Attend, in one softmax, to a prefix that a user's beams share and to each beam's own places behind it.

        For search: no dropout. The prefix is not copied; W beams become query positions of their user's row.

        Args:
            query_BQD: the last Q of the own places; the batch is users x beams, beams of a user consecutive.
            prefix: keys and values of the prefix, one a user.
            prefix_mask: True at places that exist; every user has one.
            own: keys and values of each beam's places; a query sees itself and those before it.
            beams: W.

        Shapes:
            prefix: (users, H, S, E) each. prefix_mask: (users, 1, 1, S). own: (users x beams, H, T, E) each.
            returns: (B, Q, D).
        """
        batch, length, dim = query_BQD.shape
        users, heads, width = batch // beams, self.num_heads, dim // self.num_heads
        query = self.query(query_BQD).view(users, beams, length, heads, width).permute(0, 3, 1, 2, 4)
        query = query * width**-0.5  # (users, H, W, Q, E)
        folded = query.reshape(users, heads, beams * length, width)
        far = (folded @ prefix[0].transpose(2, 3)).masked_fill(~prefix_mask, float("-inf"))
        key, value = (part.unflatten(0, (users, beams)).transpose(1, 2) for part in own)
        near = query @ key.transpose(3, 4)
        if length > 1:
            total = near.shape[-1]
            future = torch.ones(length, total, dtype=torch.bool, device=near.device).triu(total - length + 1)
            near = near.masked_fill(future, float("-inf"))
        near = near.flatten(2, 3)
        peak = torch.maximum(far.amax(3, keepdim=True), near.amax(3, keepdim=True))
        far, near = (far - peak).exp(), (near - peak).exp()
        out = (near.view(users, heads, beams, length, -1) @ value).flatten(2, 3) + far @ prefix[1]
        out = out / (far.sum(3, keepdim=True) + near.sum(3, keepdim=True))
        out = out.view(users, heads, beams, length, width).permute(0, 2, 3, 1, 4)
        return self.out(out.reshape(batch, length, dim))


def runs_fused(x: torch.Tensor) -> bool:
    """Whether Triton's kernels serve: a training pass on a GPU that has it."""
    return x.is_cuda and torch.is_grad_enabled() and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _short(length: int, width: int) -> bool:
    from genrec_dist.generator.attention_triton import fits

    return fits(length, width)


def _causal_mask(length: int, total: int, device: torch.device) -> torch.Tensor:
    """Query i stands at place total - length + i and may look at itself and all before it; (length, total) bool."""
    return torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
