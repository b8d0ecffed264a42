"""Pre-norm Transformer layers on one device, shared by the generators and the self-attentive baselines.

Shape legend: B batch, Q query length, S source length, T own length, D width.
Source: Vaswani et al. (2017); pre-norm as in Xiong et al. (2020).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from genrec_dist.generator.attention import Attention, KeyValue, runs_fused


class AddNorm(nn.LayerNorm):
    """Layer norm that can take the residual sum before it along."""

    def after(self, x: torch.Tensor, branch: torch.Tensor | None, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """x + dropout(branch), and its norm.

        Args:
            branch: what a sub-layer gave and nobody has added yet; None: nothing.
            dropout: of the branch, in training.
        """
        if runs_fused(x) and not hasattr(
            self.weight, "ds_id"
        ):  # ZeRO 3 gathers the weight for calls of the module only
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
        if not runs_fused(x):
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
