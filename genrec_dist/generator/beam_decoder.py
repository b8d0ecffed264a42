"""One step of the decoder for all beams: the model's own, or on a CPU the PRORec decoder rearranged for search.

The rearranged one computes what `DecoderLayer` computes, one place at a time and without dropout: a few users at a
time, so that activations stay in a core's cache; queries, keys and values of the first layer from a table of nodes, and
at the first step its attention to the start tokens, too; the few places behind a beam without a copy into one tensor;
cross-attention's projections of queries and outputs multiplied into a user's keys and values where its history is
short; products into buffers that are kept, sums into the residual in place. A test holds it to the model. On a GPU the
model's own is taken.

Shape legend: B users, W beams, R rows (B x W), D width, H heads, E width of a head, P start tokens, S source length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from genrec_dist.generator.attention import KeyValue
from genrec_dist.generator.model import Generator, Memory
from genrec_dist.generator.transformer import DecoderLayer

if TYPE_CHECKING:
    from genrec_dist.generator.beam import CodeGenerator

USERS_AT_ONCE = 16
"""Users whose activations stay in a core's cache."""


class BeamDecoder(Protocol):
    """States of beams, step by step; `state` is its own affair."""

    def start(self, cache: list[KeyValue] | None, memory: Any) -> Any:
        """State behind the start tokens, out of what `CodeGenerator.begin` gave."""

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


def make_decoder(
    model: CodeGenerator, tokens: torch.Tensor, prepared: bool | None = None, openers: int | None = None
) -> BeamDecoder:
    """The rearranged decoder for a PRORec generator on a CPU, else the model's own.

    Args:
        model: generator in eval mode.
        tokens: decoder inputs of inner nodes, (num_inner, D).
        prepared: take the rearranged one; None: by the device.
        openers: the first so many tokens are those that a path can begin with; None: all.
    """
    on_cpu = tokens.device.type == "cpu" if prepared is None else prepared
    if on_cpu and isinstance(model, Generator) and len(tokens):
        layers = [cast(DecoderLayer, layer) for layer in model.decoder]
        return PreparedDecoder(layers, model.decoder_norm, tokens, tokens[:openers], model.start_tokens(1)[0])
    return ModelDecoder(model, tokens)


class ModelDecoder:
    """By the model's own `decode`; arguments as of `make_decoder`."""

    def __init__(self, model: CodeGenerator, tokens: torch.Tensor) -> None:
        self.model, self.tokens = model, tokens

    def start(self, cache: list[KeyValue] | None, memory: Any) -> Any:
        return cache

    def step(
        self, token_R: torch.Tensor, source_R: torch.Tensor, memory: Any, state: Any, beams: int, last: bool
    ) -> tuple[torch.Tensor, Any]:
        if state is not None:
            state = [(key[source_R], value[source_R]) for key, value in state]
        hidden, state = self.model.decode(self.tokens[token_R][:, None], memory, state, beams)
        return hidden[:, -1], state


class Folded(NamedTuple):
    """A user's keys and values of a layer as one matrix from states to scores, and one from weights to the output.

    Scores of a head are (x Q + q) K' = x (Q K') + q K', its output is w (V O). With S places and H heads these products
    are of S x H columns instead of D, so a beam's cost less where S x H is below D.

    Shapes:
        scores: (B, S x H, D). bias: (B, S x H, 1), -inf where no item is. out: (B, S x H, D).
    """

    scores: torch.Tensor
    bias: torch.Tensor
    out: torch.Tensor


class Behind(NamedTuple):
    """What a beam sees of its own sequence, and of its user.

    Shapes:
        prefix: by layer and start token, keys and values (B, 1, H, E).
        own: by step, keys and values of all layers side by side, (R, 2 x D x layers).
        folded: by layer; none where that would cost more.
    """

    prefix: list[list[KeyValue]]
    own: list[torch.Tensor]
    folded: list[Folded]


class _Product:
    """x W + b. The weight lies as it is read, which is a twentieth faster."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.weight, self.bias = weight.T.contiguous(), bias

    @classmethod
    def of(cls, linear: nn.Module) -> _Product:
        """That of a linear layer."""
        layer = cast(nn.Linear, linear)
        return cls(layer.weight, layer.bias)

    def into(self, x: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Written to a buffer, which is returned."""
        return torch.addmm(self.bias, x, self.weight, out=held)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """Added in place."""
        total.addmm_(x, self.weight).add_(self.bias)


class _Layer:
    """Weights of one layer as the step takes them: queries, keys and values in one product."""

    def __init__(self, layer: DecoderLayer) -> None:
        own, crossed, ffn = layer.self_attention, layer.cross_attention, layer.ffn
        self.norm, self.out = layer.self_norm, _Product.of(own.out)
        self.project = _Product(
            torch.cat([own.query.weight, own.key_value.weight]), torch.cat([own.query.bias, own.key_value.bias])
        )
        self.cross_norm, self.crossed = layer.cross_norm, crossed
        self.cross_query, self.cross_out = _Product.of(crossed.query), _Product.of(crossed.out)
        self.ffn_norm, self.wide, self.narrow = layer.ffn_norm, _Product.of(ffn[0]), _Product.of(ffn[3])

    def fold(self, memory: KeyValue, mask: torch.Tensor) -> Folded:
        """Keys and values (B, H, S, E) with the projections of queries and outputs multiplied in."""
        users, heads, length, width = memory[0].shape
        # By head (H, B x S, E), which is no copy of what `Attention.project` gives.
        key, value = (part.permute(1, 0, 2, 3).reshape(heads, users * length, width) for part in memory)
        query, out = self.crossed.query, self.crossed.out
        scale = width**-0.5
        scores = _by_place(key, query.weight.view(heads, width, -1) * scale)
        bias = _by_place(key, query.bias.view(heads, width, 1) * scale).view(users, length, heads)
        mixed = _by_place(value, out.weight.view(-1, heads, width).permute(1, 2, 0).contiguous())
        mixed += out.bias / heads  # the weights of a head add up to 1
        bias = bias.masked_fill(~mask[:, 0, 0, :, None], float("-inf"))
        return Folded(*(part.view(users, length * heads, -1) for part in (scores, bias, mixed)))


def _by_place(part_HNE: torch.Tensor, weight_HED: torch.Tensor) -> torch.Tensor:
    """Products of each head side by side, (N, H, D)."""
    heads, rows, _ = part_HNE.shape
    out = part_HNE.new_empty(rows, heads, weight_HED.shape[2])
    torch.bmm(part_HNE, weight_HED, out=out.transpose(0, 1))
    return out


class PreparedDecoder:
    """The decoder of the PRORec generator on a CPU.

    Args:
        layers, norm: of the model, in eval mode.
        tokens: decoder inputs of inner nodes, (num_inner, D).
        openers: the first of them, which are all that a first step is given.
        start: decoder inputs of the start tokens, (P, D).
    """

    def __init__(
        self,
        layers: list[DecoderLayer],
        norm: nn.LayerNorm,
        tokens: torch.Tensor,
        openers: torch.Tensor,
        start: torch.Tensor,
    ) -> None:
        self.layers, self.norm, self.tokens = [_Layer(layer) for layer in layers], norm, tokens
        self.heads, self.dim = layers[0].self_attention.num_heads, tokens.shape[1]
        project = self.layers[0].project
        self._buffers: dict[str, torch.Tensor] = {}
        self.first, of_start = (
            torch.addmm(project.bias, self.layers[0].norm(x), project.weight) for x in (tokens, start)
        )
        # Opening tokens behind the first layer's attention to the start tokens, in which no user has a part yet.
        self.opened = openers.clone()
        if len(openers):
            places = of_start[:, self.dim :].view(len(start), 2, 1, 1, self.heads, -1)
            prefix = [(key, value) for key, value in places]
            self.layers[0].out.add_to(self.opened, self._attend(self.first[: len(openers)], prefix, [], len(openers)))

    def start(self, cache: list[KeyValue] | None, memory: Memory) -> Behind:
        assert cache is not None
        prefix = []
        for layer in cache:
            places = zip(*(part.transpose(1, 2).split(1, 1) for part in layer))
            prefix.append([(key, value) for key, value in places])
        keys, mask = memory
        folds = self.heads * mask.shape[3] <= self.dim
        return Behind(prefix, [], [layer.fold(kv, mask) for layer, kv in zip(self.layers, keys)] if folds else [])

    def step(
        self, token_R: torch.Tensor, source_R: torch.Tensor, memory: Memory, state: Behind, beams: int, last: bool
    ) -> tuple[torch.Tensor, Behind]:
        opens = not state.own
        own = [kept[source_R] for kept in state.own]
        out = self.tokens.new_empty(len(token_R), self.dim)
        grown = None if last else out.new_empty(len(out), 2 * self.dim * len(self.layers))
        for first in range(0, len(out) // beams, USERS_AT_ONCE):
            users = slice(first, first + USERS_AT_ONCE)
            rows = slice(first * beams, (first + USERS_AT_ONCE) * beams)
            x = (self.opened if opens else self.tokens)[token_R[rows]]
            for i, layer in enumerate(self.layers):
                keys_values = slice(2 * self.dim * i, 2 * self.dim * (i + 1))
                attended = opens and i == 0
                if grown is not None or not attended:
                    projected = self._project(i, x, token_R[rows])
                if grown is not None:
                    grown[rows, keys_values] = projected[:, self.dim :]
                if not attended:
                    behind = [kept[rows, keys_values] for kept in own]
                    prefix = [(key[users], value[users]) for key, value in state.prefix[i]]
                    layer.out.add_to(x, self._attend(projected, prefix, behind, beams))
                if state.folded:
                    self._cross_folded(layer, x, Folded(*(part[users] for part in state.folded[i])), beams)
                else:
                    self._cross(layer, x, memory[0][i][0][users], memory[0][i][1][users], memory[1][users], beams)
                wide = layer.wide.into(layer.ffn_norm(x), self._buffer("wide", len(x), layer.wide.weight.shape[1]))
                layer.narrow.add_to(x, torch.ops.aten.gelu_(wide))
            out[rows] = self.norm(x)
        return out, Behind(state.prefix, own if grown is None else [*own, grown], state.folded)

    def _cross_folded(self, layer: _Layer, x_RD: torch.Tensor, folded: Folded, beams: int) -> None:
        """Add cross-attention in place."""
        normed = layer.cross_norm(x_RD).view(-1, beams, self.dim)
        weights = torch.baddbmm(folded.bias, folded.scores, normed.transpose(1, 2))  # softmax is faster across beams
        weights = weights.view(len(weights), -1, self.heads, beams).softmax(1).view(weights.shape)
        x_RD.view(normed.shape).baddbmm_(weights.transpose(1, 2), folded.out)

    def _cross(
        self, layer: _Layer, x_RD: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, beams: int
    ) -> None:
        """Add cross-attention in place, by the keys and values (B, H, S, E) themselves."""
        query = layer.cross_query.into(layer.cross_norm(x_RD), self._buffer("query", len(x_RD), self.dim))
        query = query.view(-1, beams, self.heads, self.dim // self.heads).transpose(1, 2)
        crossed = F.scaled_dot_product_attention(query, key, value, mask)
        layer.cross_out.add_to(x_RD, crossed.transpose(1, 2).reshape(x_RD.shape))

    def _project(self, i: int, x_RD: torch.Tensor, token_R: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of a layer, (R, 3 D)."""
        held = self._buffer("projected", len(token_R), self.first.shape[1])
        if not i:
            return torch.index_select(self.first, 0, token_R, out=held)
        return self.layers[i].project.into(self.layers[i].norm(x_RD), held)

    def _attend(
        self, projected: torch.Tensor, prefix: list[KeyValue], behind: list[torch.Tensor], beams: int
    ) -> torch.Tensor:
        """Attention of each row to the start tokens, its own places and itself, (R, D)."""
        shape = (len(projected) // beams, beams, self.heads, self.dim // self.heads)
        query, own = projected.split([self.dim, 2 * self.dim], 1)
        query = query.view(shape)
        places = [tuple(part.view(shape) for part in both.split(self.dim, 1)) for both in (*behind, own)]
        product = self._buffer("attended", len(projected), self.dim).view(shape)
        if len(prefix) == len(places) == 1:  # of two weights that add up to 1 the logistic function gives one
            (start_key, start_value), (key, value) = prefix[0], places[0]
            difference = torch.sub(key, start_key, out=product).mul_(query).sum(3)
            weight = difference.mul_(shape[3] ** -0.5).sigmoid_()[..., None]
            return torch.sub(value, start_value, out=product).mul_(weight).add_(start_value).view(-1, self.dim)
        scores = [torch.mul(query, key, out=product).sum(3) for key, _ in (*prefix, *places)]
        weights = (torch.stack(scores) * shape[3] ** -0.5).softmax(0)[..., None]
        mixed = torch.mul(weights[-1], places[-1][1], out=product)
        spread = self._buffer("spread", len(projected), self.dim).view(shape)
        for weight, (_, value) in zip(weights[:-1], (*prefix, *places[:-1])):
            # A value of a user times weights of its beams: broadcasting both is many times slower than this copy.
            mixed.addcmul_(weight, spread.copy_(value) if value.shape[1] == 1 else value)
        return mixed.view(-1, self.dim)

    def _buffer(self, name: str, rows: int, width: int) -> torch.Tensor:
        """Memory that the next use of the name overwrites: fresh memory of this size costs page faults."""
        held = self._buffers.get(name)
        if held is None or len(held) < rows:
            held = self._buffers[name] = self.tokens.new_empty(rows, width)
        return held[:rows]
