"""Weights of this project's Transformer layers, copied into PyTorch's own: the reference they are held against."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from genrec_dist.generator.attention import Attention
from genrec_dist.generator.transformer import DecoderLayer, EncoderLayer


def reference_attention(attention: Attention) -> nn.MultiheadAttention:
    """torch.nn.MultiheadAttention with the same weights."""
    dim = attention.out.in_features
    reference = nn.MultiheadAttention(dim, attention.num_heads, batch_first=True)
    _copy_attention(attention, reference)
    return reference.eval()


def reference_encoder_layer(layer: EncoderLayer) -> nn.TransformerEncoderLayer:
    """torch.nn.TransformerEncoderLayer (pre-norm, GELU) with the same weights."""
    reference = nn.TransformerEncoderLayer(**_shape(layer))
    _copy_attention(layer.attention, reference.self_attn)
    _copy_rest(layer, reference, [layer.attention_norm, layer.ffn_norm])
    return reference.eval()


def reference_decoder_layer(layer: DecoderLayer) -> nn.TransformerDecoderLayer:
    """torch.nn.TransformerDecoderLayer (pre-norm, GELU) with the same weights."""
    reference = nn.TransformerDecoderLayer(**_shape(layer))
    _copy_attention(layer.self_attention, reference.self_attn)
    _copy_attention(layer.cross_attention, reference.multihead_attn)
    _copy_rest(layer, reference, [layer.self_norm, layer.cross_norm, layer.ffn_norm])
    return reference.eval()


def _shape(layer: EncoderLayer | DecoderLayer) -> dict:
    attention = layer.attention if isinstance(layer, EncoderLayer) else layer.self_attention
    first = layer.ffn[0]
    return {
        "d_model": first.in_features,
        "nhead": attention.num_heads,
        "dim_feedforward": first.out_features,
        "dropout": 0.0,
        "activation": "gelu",
        "batch_first": True,
        "norm_first": True,
    }


@torch.no_grad()
def _copy_attention(own: Attention, reference: nn.MultiheadAttention) -> None:
    reference.in_proj_weight.copy_(torch.cat([own.query.weight, own.key_value.weight]))
    reference.in_proj_bias.copy_(torch.cat([own.query.bias, own.key_value.bias]))
    reference.out_proj.load_state_dict(own.out.state_dict())


def _copy_rest(own: nn.Module, reference: nn.Module, norms: list[nn.LayerNorm]) -> None:
    for number, norm in enumerate(norms, start=1):
        getattr(reference, f"norm{number}").load_state_dict(norm.state_dict())
    ffn = cast(nn.Sequential, own.ffn)
    cast(nn.Linear, reference.linear1).load_state_dict(ffn[0].state_dict())
    cast(nn.Linear, reference.linear2).load_state_dict(ffn[3].state_dict())


def without_unseen_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter without what rounding decides: the biases of attention keys and of DIN's pooling have gradient zero
    (softmax does not see them), and Adam makes steps of its rounding."""
    if name.endswith((".key.bias", ".pool.bias")):
        return tensor[:0]
    return tensor[len(tensor) // 2 :] if name.endswith("key_value.bias") else tensor
