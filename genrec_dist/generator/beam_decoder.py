"""One step of the decoder for all beams: the model's own, or on a CPU the PRORec decoder rearranged for search.

The rearranged one computes what `DecoderLayer` computes, one place at a time and without dropout: a few users at a
time, so that activations stay in a core's cache; queries, keys and values of the first layer from a table of nodes; the
few places behind a beam without a copy into one tensor; products into buffers that are kept, sums into the residual in
place. A test holds it to the model. On a GPU the model's own is taken.

Shape legend: B users, W beams, R rows (B x W), D width, H heads, E width of a head, P start tokens, S source length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from genrec_dist.generator.model import Generator, Memory
from genrec_dist.generator.transformer import DecoderLayer, KeyValue

if TYPE_CHECKING:
    from genrec_dist.generator.beam import CodeGenerator

USERS_AT_ONCE = 16
"""Users whose activations stay in a core's cache."""


class BeamDecoder(Protocol):
    """States of beams, step by step; `state` is its own affair."""

    def start(self, cache: list[KeyValue] | None) -> Any:
        """State behind the start tokens of `CodeGenerator.begin`."""

    def step(
        self, token_R: torch.Tensor, source_R: torch.Tensor, memory: Any, state: Any, beams: int, last: bool
    ) -> tuple[torch.Tensor, Any]:
        """States (R, D) that predict the next code, and the state behind them.

        Args:
            token_R: rows of the table of tokens.
            source_R: row that each beam goes on from, of the step before; its user, at the first step.
            memory: of `CodeGenerator.begin`.
            beams: W, beams of a user consecutive.
            last: no step follows.
        """


def make_decoder(model: CodeGenerator, tokens: torch.Tensor, prepared: bool | None = None) -> BeamDecoder:
    """The rearranged decoder for a PRORec generator on a CPU, else the model's own.

    Args:
        model: generator in eval mode.
        tokens: decoder inputs of inner nodes, (num_inner, D).
        prepared: take the rearranged one; None: by the device.
    """
    on_cpu = tokens.device.type == "cpu" if prepared is None else prepared
    if on_cpu and isinstance(model, Generator) and len(tokens):
        return PreparedDecoder([cast(DecoderLayer, layer) for layer in model.decoder], model.decoder_norm, tokens)
    return ModelDecoder(model, tokens)


class ModelDecoder:
    """By the model's own `decode`; arguments as of `make_decoder`."""

    def __init__(self, model: CodeGenerator, tokens: torch.Tensor) -> None:
        self.model, self.tokens = model, tokens

    def start(self, cache: list[KeyValue] | None) -> Any:
        return cache

    def step(
        self, token_R: torch.Tensor, source_R: torch.Tensor, memory: Any, state: Any, beams: int, last: bool
    ) -> tuple[torch.Tensor, Any]:
        if state is not None:
            state = [(key[source_R], value[source_R]) for key, value in state]
        hidden, state = self.model.decode(self.tokens[token_R][:, None], memory, state, beams)
        return hidden[:, -1], state


class Behind(NamedTuple):
    """What a beam sees of its own sequence.

    Shapes:
        prefix: by layer and start token, keys and values (B, 1, H, E).
        own: by step, keys and values of all layers side by side, (R, 2 x D x layers).
    """

    prefix: list[list[KeyValue]]
    own: list[torch.Tensor]


class _Layer:
    """Weights of one layer as the step takes them: queries, keys and values in one product."""

    def __init__(self, layer: DecoderLayer) -> None:
        own, crossed, ffn = layer.self_attention, layer.cross_attention, layer.ffn
        self.norm, self.out = layer.self_norm, own.out
        self.weight = torch.cat([own.query.weight, own.key_value.weight])
        self.bias = torch.cat([own.query.bias, own.key_value.bias])
        self.cross_norm, self.cross_query, self.cross_out = layer.cross_norm, crossed.query, crossed.out
        self.ffn_norm, self.wide, self.narrow = layer.ffn_norm, cast(nn.Linear, ffn[0]), cast(nn.Linear, ffn[3])


class PreparedDecoder:
    """The decoder of the PRORec generator on a CPU.

    Args:
        layers, norm: of the model, in eval mode.
        tokens: decoder inputs of inner nodes, (num_inner, D).
    """

    def __init__(self, layers: list[DecoderLayer], norm: nn.LayerNorm, tokens: torch.Tensor) -> None:
        self.layers, self.norm, self.tokens = [_Layer(layer) for layer in layers], norm, tokens
        self.heads, self.dim = layers[0].self_attention.num_heads, tokens.shape[1]
        self.first = F.linear(self.layers[0].norm(tokens), self.layers[0].weight, self.layers[0].bias)
        self._buffers: dict[str, torch.Tensor] = {}

    def start(self, cache: list[KeyValue] | None) -> Behind:
        assert cache is not None
        prefix = []
        for layer in cache:
            places = zip(*(part.transpose(1, 2).split(1, 1) for part in layer))
            prefix.append([(key, value) for key, value in places])
        return Behind(prefix, [])

    def step(
        self, token_R: torch.Tensor, source_R: torch.Tensor, memory: Memory, state: Behind, beams: int, last: bool
    ) -> tuple[torch.Tensor, Behind]:
        own = [kept[source_R] for kept in state.own]
        out = self.tokens.new_empty(len(token_R), self.dim)
        grown = None if last else out.new_empty(len(out), 2 * self.dim * len(self.layers))
        keys, mask = memory
        for first in range(0, len(out) // beams, USERS_AT_ONCE):
            users = slice(first, first + USERS_AT_ONCE)
            rows = slice(first * beams, (first + USERS_AT_ONCE) * beams)
            x = self.tokens[token_R[rows]]
            for i, layer in enumerate(self.layers):
                projected = self._project(i, x, token_R[rows])
                if grown is not None:
                    grown[rows, 2 * self.dim * i : 2 * self.dim * (i + 1)] = projected[:, self.dim :]
                behind = [kept[rows, 2 * self.dim * i : 2 * self.dim * (i + 1)] for kept in own]
                prefix = [(key[users], value[users]) for key, value in state.prefix[i]]
                _add_product(x, self._attend(projected, prefix, behind, beams), layer.out)
                query = self._product("query", layer.cross_norm(x), layer.cross_query.weight, layer.cross_query.bias)
                query = query.view(-1, beams, self.heads, self.dim // self.heads).transpose(1, 2)
                crossed = F.scaled_dot_product_attention(query, keys[i][0][users], keys[i][1][users], mask[users])
                _add_product(x, crossed.transpose(1, 2).reshape(x.shape), layer.cross_out)
                wide = self._product("wide", layer.ffn_norm(x), layer.wide.weight, layer.wide.bias)
                _add_product(x, torch.ops.aten.gelu_(wide), layer.narrow)
            out[rows] = self.norm(x)
        return out, Behind(state.prefix, own if grown is None else [*own, grown])

    def _project(self, i: int, x_RD: torch.Tensor, token_R: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of a layer, (R, 3 D)."""
        if not i:
            held = self._buffer("projected", len(token_R), self.first.shape[1])
            return torch.index_select(self.first, 0, token_R, out=held)
        layer = self.layers[i]
        return self._product("projected", layer.norm(x_RD), layer.weight, layer.bias)

    def _attend(
        self, projected: torch.Tensor, prefix: list[KeyValue], behind: list[torch.Tensor], beams: int
    ) -> torch.Tensor:
        """Attention of each row to the start tokens, its own places and itself, (R, D)."""
        shape = (len(projected) // beams, beams, self.heads, self.dim // self.heads)
        query, own = projected.split([self.dim, 2 * self.dim], 1)
        query = query.view(shape)
        places = [tuple(part.view(shape) for part in both.split(self.dim, 1)) for both in (*behind, own)]
        product = self._buffer("attended", len(projected), self.dim).view(shape)
        scores = [torch.mul(query, key, out=product).sum(3) for key, _ in (*prefix, *places)]
        weights = (torch.stack(scores) * shape[3] ** -0.5).softmax(0)[..., None]
        mixed = torch.mul(weights[-1], places[-1][1], out=product)
        spread = self._buffer("spread", len(projected), self.dim).view(shape)
        for weight, (_, value) in zip(weights[:-1], (*prefix, *places[:-1])):
            # A value of a user times weights of its beams: broadcasting both is many times slower than this copy.
            mixed.addcmul_(weight, spread.copy_(value) if value.shape[1] == 1 else value)
        return mixed.view(-1, self.dim)

    def _product(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.addmm(bias, x, weight.T, out=self._buffer(name, len(x), len(weight)))

    def _buffer(self, name: str, rows: int, width: int) -> torch.Tensor:
        """Memory that the next use of the name overwrites: fresh memory of this size costs page faults."""
        held = self._buffers.get(name)
        if held is None or len(held) < rows:
            held = self._buffers[name] = self.tokens.new_empty(rows, width)
        return held[:rows]


def _add_product(x_RD: torch.Tensor, part: torch.Tensor, linear: nn.Linear) -> None:
    """x += linear(part), in place."""
    x_RD.addmm_(part, linear.weight.T).add_(linear.bias)
