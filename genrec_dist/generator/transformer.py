"""Pre-norm Transformer layers on one device, shared by the generators and the self-attentive baselines.

Shape legend: B batch, Q query length, S source length, T own length, W beams, D width, H heads, E width of a head.
Source: Vaswani et al. (2017); pre-norm as in Xiong et al. (2020).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

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
        if _fused(source_BSD) and _short(length, width):
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


def _fused(x: torch.Tensor) -> bool:
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


class AddNorm(nn.LayerNorm):
    """Layer norm that can take the residual sum before it along."""

    def after(self, x: torch.Tensor, branch: torch.Tensor | None, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """x + dropout(branch), and its norm.

        Args:
            branch: what a sub-layer gave and nobody has added yet; None: nothing.
            dropout: of the branch, in training.
        """
        if _fused(x) and not hasattr(self.weight, "ds_id"):  # ZeRO 3 gathers the weight for calls of the module only
            from genrec_dist.generator.fused_triton import WIDEST, add_norm

            if x.shape[-1] <= WIDEST:
                dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
                rate = dropout if self.training else 0.0
                return add_norm(x, branch, self.weight, self.bias, self.eps, rate, dtype)
        if branch is not None:
            x = x + F.dropout(branch, dropout, self.training)
        return x, self(x)


class FeedForward(nn.Sequential):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, multiplier: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(dim, multiplier * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(multiplier * dim, dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        if not _fused(x):
            return super().forward(x)
        from genrec_dist.generator.fused_triton import gelu_dropout

        rate = cast(nn.Dropout, self[2]).p if self.training else 0.0
        return self[3](gelu_dropout(self[0](x), rate))


class Layer(nn.Module):
    """What a model stacks to get deeper.

    A call is the training pass and needs nothing but its arguments and the layer's own parameters: an engine may bring
    them at the call and take them away behind it. Subclasses say in `carry` what it computes.
    """

    recomputes = False

    @property
    def residual_outputs(self) -> list[nn.Linear]:
        """What each of its branches ends with, before it is added to the state."""
        raise NotImplementedError

    def carry(self, *args: Any) -> Any:
        """What is behind the layer."""
        raise NotImplementedError

    def forward(self, *args: Any) -> Any:
        """`carry`, whose activations are kept or, after `checkpoint_activations`, computed again."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(self.carry, *args, use_reentrant=False)
        return self.carry(*args)


class _Layer(Layer):
    """What the Transformer's layers share: pre-norm, and a last branch that the next norm adds.

    A call takes a state and a branch that is not added yet and returns both anew, so that sum, dropout and norm are one
    kernel where that pays. The methods for search find the layer's parameters in place.
    """

    def _add_feed_forward(self, dim: int, multiplier: int, dropout: float) -> None:
        self.ffn_norm = AddNorm(dim)
        self.ffn = FeedForward(dim, multiplier, dropout)
        self.dropout = nn.Dropout(dropout)

    def _feed(self, x: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, normed = self.ffn_norm.after(x, branch, self.dropout.p)
        return x, self.ffn(normed)


class _SelfAttentionLayer(_Layer):
    """Self-attention and feed-forward; subclasses say what attends to what."""

    def __init__(self, dim: int, num_heads: int, multiplier: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = AddNorm(dim)
        self.attention = Attention(dim, num_heads, dropout)
        self._add_feed_forward(dim, multiplier, dropout)

    @property
    def residual_outputs(self) -> list[nn.Linear]:
        return [self.attention.out, cast(nn.Linear, self.ffn[3])]


class EncoderLayer(_SelfAttentionLayer):
    """Every place attends to all places that the mask allows."""

    def carry(
        self, x_BSD: torch.Tensor, branch: torch.Tensor | None, mask: torch.Tensor | None, causal: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `_Layer`."""
        x_BSD, normed = self.attention_norm.after(x_BSD, branch, self.dropout.p)
        return self._feed(x_BSD, self.attention(normed, self.attention.own(normed), mask, causal))


class DecoderLayer(_Layer):
    """Causal self-attention with an optional cache, cross-attention, feed-forward."""

    def __init__(self, dim: int, num_heads: int, multiplier: int, dropout: float) -> None:
        super().__init__()
        self.self_norm = AddNorm(dim)
        self.self_attention = Attention(dim, num_heads, dropout)
        self.cross_norm = AddNorm(dim)
        self.cross_attention = Attention(dim, num_heads, dropout)
        self._add_feed_forward(dim, multiplier, dropout)

    @property
    def residual_outputs(self) -> list[nn.Linear]:
        return [self.self_attention.out, self.cross_attention.out, cast(nn.Linear, self.ffn[3])]

    def carry(
        self, x_BTD: torch.Tensor, branch: torch.Tensor | None, source_BSD: torch.Tensor, source_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `_Layer`; the source is the encoder's states."""
        memory = self.cross_attention.own(source_BSD)
        x_BTD, normed = self.self_norm.after(x_BTD, branch, self.dropout.p)
        attended = self.self_attention(normed, self.self_attention.own(normed), causal=normed.shape[1] > 1)
        x_BTD, normed = self.cross_norm.after(x_BTD, attended, self.dropout.p)
        return self._feed(x_BTD, self.cross_attention(normed, memory, source_mask))

    def extend(
        self,
        x_BQD: torch.Tensor,
        memory: KeyValue,
        memory_mask: torch.Tensor,
        cache: KeyValue | None = None,
        beams: int = 1,
    ) -> tuple[torch.Tensor, KeyValue]:
        """States of further places, and the grown self-attention cache.

        Args:
            x_BQD: decoder states; with `beams` W > 1 the batch is users x beams, beams of a user consecutive.
            memory: keys and values of the encoder's states, one a user, shared by its beams.
            memory_mask: (users, 1, 1, S) bool, True at items.
            cache: keys and values of earlier positions; the new ones are appended.
            beams: W.
        """
        normed = self.self_norm(x_BQD)
        key, value = self.self_attention.project(normed)
        if cache is not None:
            key, value = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        x_BQD = x_BQD + self.dropout(self.self_attention(normed, (key, value), causal=normed.shape[1] > 1))
        # Beams of a user become query positions of one row: the memory is never copied.
        batch, length, dim = x_BQD.shape
        normed = self.cross_norm(x_BQD).view(batch // beams, beams * length, dim)
        crossed = self.cross_attention(normed, memory, memory_mask).view(batch, length, dim)
        x_BQD, branch = self._feed(x_BQD, crossed)
        return x_BQD + self.dropout(branch), (key, value)


class CausalLayer(_SelfAttentionLayer):
    """Causal, over a whole sequence or behind a shared prefix."""

    def carry(self, x_BSD: torch.Tensor, branch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `_Layer`; a sequence from its start.

        Right padding needs no mask: no real place looks at it.
        """
        x_BSD, normed = self.attention_norm.after(x_BSD, branch, self.dropout.p)
        return self._feed(x_BSD, self.attention(normed, self.attention.own(normed), causal=True))

    def begin(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, KeyValue]:
        """States of a sequence from its start, and the keys and values that later places need."""
        normed = self.attention_norm(x_BSD)
        own = self.attention.project(normed)
        x_BSD, branch = self._feed(x_BSD, self.attention(normed, own, causal=True))
        return x_BSD + self.dropout(branch), own

    def extend(
        self,
        x_BQD: torch.Tensor,
        prefix: KeyValue,
        prefix_mask: torch.Tensor,
        cache: KeyValue | None,
        beams: int,
    ) -> tuple[torch.Tensor, KeyValue]:
        """States of further places behind a prefix, and the grown cache; arguments as in `Attention.behind`."""
        normed = self.attention_norm(x_BQD)
        key, value = self.attention.project(normed)
        if cache is not None:
            key, value = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        attended = self.attention.behind(normed, prefix, prefix_mask, (key, value), beams)
        x_BQD, branch = self._feed(x_BQD, attended)
        return x_BQD + self.dropout(branch), (key, value)


def transformer_layers(model: nn.Module) -> dict[str, _Layer]:
    """The Transformer layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Layer)}


def checkpoint_activations(model: nn.Module) -> None:
    """Make the layers of a model keep their inputs only, and compute the rest again in the backward pass.

    Dropout draws the same numbers again. Layers used in search or evaluation are not changed by it.
    """
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.recomputes = True


def scale_residuals(layers: Iterable[nn.Module]) -> None:
    """Divide the start of all branches' outputs of a stack by the square root of their number.

    However many layers, the state that leaves the stack then starts about as large.

    Source: Radford et al. (2019), section 2.3.
    """
    outputs = [out for layer in layers for out in cast(Layer, layer).residual_outputs]
    with torch.no_grad():
        for out in outputs:
            out.weight.mul_(len(outputs) ** -0.5)


def init_weights(module: nn.Module) -> None:
    """Normal(0, 0.02) for matrices and embeddings, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
