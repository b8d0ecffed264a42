"""Transformer layers with two parameters each: all weights of products in one row, all biases and norms in another.

An engine that works parameter by parameter (DeepSpeed's hooks, gathers, reductions and norms) then has a tenth of the
work, all of it on large tensors, and mixed precision casts a layer at once. For the time of a call the weights of a
layer's modules are pieces of the flat parameters. States keep the names of the pieces: `split` and `join` translate.
Knows nothing of any engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

State = dict[str, torch.Tensor]
ALIGNED = 32
"""Pieces start at multiples of so many numbers, as kernels of matrix products like it."""


@dataclass
class Piece:
    """A weight of a module, as a part of a flat parameter.

    Attributes:
        name: of the weight below its layer.
        is_product: of a linear layer, so that mixed precision casts it.
    """

    module: nn.Module
    attribute: str
    name: str
    shape: torch.Size
    is_product: bool

    @property
    def room(self) -> int:
        """Numbers that it takes, alignment included."""
        return -(-self.shape.numel() // ALIGNED) * ALIGNED

    def cut(self, row: torch.Tensor) -> torch.Tensor:
        """The weight out of its part of a flat parameter."""
        return (row if self.shape.numel() == self.room else row[: self.shape.numel()]).view(self.shape)


class FlatLayer:
    """A layer whose weights of products are the parameter `matrices` (1, n) and whose other ones `vectors` (m,).

    Its modules leave the module tree of the model, so that an engine's hooks are at the layer alone.

    Args:
        layer: calls `carry` and nothing else while its weights are away.
        resharded: whatever the forward pass saved of the weights for the backward pass is taken from the parameters
            again, which an engine may have taken away and brought back meanwhile.
    """

    def __init__(self, layer: nn.Module, resharded: bool) -> None:
        self.layer, self.resharded = layer, resharded
        self.groups: dict[str, list[Piece]] = {"matrices": [], "vectors": []}
        values: dict[str, list[torch.Tensor]] = {"matrices": [], "vectors": []}
        for path, module in layer.named_modules():
            for attribute, value in list(module.named_parameters(recurse=False)):
                piece = Piece(
                    module, attribute, f"{path}.{attribute}".lstrip("."), value.shape, isinstance(module, nn.Linear)
                )
                kind = "matrices" if piece.is_product and value.ndim == 2 else "vectors"
                self.groups[kind].append(piece)
                values[kind].append(value.detach())
                delattr(module, attribute)
        for kind, pieces in self.groups.items():
            flat = join_pieces(pieces, dict(zip((p.name for p in pieces), values[kind])))
            layer.register_parameter(kind, nn.Parameter(flat[None] if kind == "matrices" else flat))
        self.modules = list(layer.children())
        self.is_shown = False
        vars(layer).update(layer._modules)
        layer._modules.clear()
        layer.train = self.train  # type: ignore[method-assign]
        self.hide()
        self._carry: Callable[..., Any] = layer.carry  # type: ignore[assignment]
        layer.carry = self.carry  # type: ignore[assignment]

    def carry(self, *args: Any) -> Any:
        """The layer's own, with its weights in place."""
        weights = _Weights(self.parameter("matrices"), self.parameter("vectors"))
        self._place(weights.rows, weights.low_rows)
        hooks: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.resharded and torch.is_grad_enabled() and not getattr(self.layer, "recomputes", False):
            hooks = torch.autograd.graph.saved_tensors_hooks(weights.pack, weights.unpack)
        try:
            with hooks:
                return self._carry(*args)
        finally:
            (self.show if self.is_shown else self.hide)()
            weights.let_go()

    def train(self, mode: bool = True) -> nn.Module:
        """`nn.Module.train` of the layer and the modules that left it."""
        for child in self.modules:
            child.train(mode)
        return nn.Module.train(self.layer, mode)

    def parameter(self, kind: str) -> nn.Parameter:
        """'matrices' or 'vectors'."""
        return self.layer.get_parameter(kind)

    def show(self) -> None:
        """Weights in place for use without gradients, for as long as the parameters are."""
        self.is_shown = True
        rows = [self.parameter("matrices").detach()[0], self.parameter("vectors").detach()]
        self._place(rows, rows)

    def hide(self) -> None:
        """Let go of the weights."""
        self.is_shown = False
        for pieces in self.groups.values():
            for piece in pieces:
                vars(piece.module)[piece.attribute] = None

    def _place(self, rows: list[torch.Tensor], low_rows: list[torch.Tensor]) -> None:
        for pieces, row, low in zip(self.groups.values(), rows, low_rows):
            rooms = [piece.room for piece in pieces]
            whole = row.split(rooms)
            cast = whole if low is row else low.split(rooms)
            for piece, a, b in zip(pieces, whole, cast):
                vars(piece.module)[piece.attribute] = piece.cut(b if piece.is_product else a)


class _Weights:
    """Flat parameters during a call, and in the type of products where that is another."""

    def __init__(self, matrices: nn.Parameter, vectors: nn.Parameter) -> None:
        self._parameters, kind = (matrices, vectors), matrices.device.type
        self._low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.rows = [matrices[0], vectors]
        self.low_rows = self._cast(self.rows)
        self._spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (*self.rows, *self.low_rows)]
        self._again: list[torch.Tensor] | None = None

    def _cast(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        return rows if self._low is None else [row.to(self._low) for row in rows]

    def let_go(self) -> None:
        """Keep no weights alive until the backward pass."""
        self.rows, self.low_rows = [], []

    def pack(self, saved: torch.Tensor) -> Any:
        """A view of the weights as its place in them; other tensors as they are."""
        at = saved.data_ptr()
        for index, (start, end) in enumerate(self._spans):
            if start <= at < end:
                return index, saved.size(), saved.stride(), (at - start) // saved.element_size()
        return saved

    def unpack(self, packed: Any) -> torch.Tensor:
        """The weights as they are now in the backward pass; cast once for all that ask."""
        if isinstance(packed, torch.Tensor):
            return packed
        if self._again is None:
            rows = [parameter.detach().flatten() for parameter in self._parameters]
            self._again = [*rows, *self._cast(rows)]
        index, size, stride, offset = packed
        base = self._again[index]
        return base.as_strided(size, stride, base.storage_offset() + offset)


def join_pieces(pieces: list[Piece], values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One row out of the weights of a group; zeros for one that has no value, and between them."""
    some = next(iter(values.values()))
    row = some.new_zeros(sum(piece.room for piece in pieces))
    for piece, part in zip(pieces, row.split([piece.room for piece in pieces])):
        if piece.name in values:
            part[: piece.shape.numel()] = values[piece.name].flatten()
    return row


class FlatLayers:
    """All layers of a model, flat.

    Args:
        layers: by name in the model.
        resharded: see `FlatLayer`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], resharded: bool) -> None:
        self.layers = {name: FlatLayer(layer, resharded) for name, layer in layers.items()}
        self._groups = {
            f"{name}.{kind}": (name, pieces)
            for name, flat in self.layers.items()
            for kind, pieces in flat.groups.items()
        }

    def matrices(self) -> list[nn.Parameter]:
        """The flat weights of products, one a layer."""
        return [flat.parameter("matrices") for flat in self.layers.values()]

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While it is open, all weights are in place; the parameters have to be whole."""
        for layer in self.layers.values():
            layer.show()
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.hide()

    def split(self, state: State) -> State:
        """A state by the names of the pieces; names may have a prefix that ends in '/'."""
        found = {}
        for key, value in state.items():
            prefix, slash, name = key.rpartition("/")
            if name not in self._groups:
                found[key] = value
                continue
            layer, pieces = self._groups[name]
            rows = value.flatten().split([piece.room for piece in pieces])
            for piece, row in zip(pieces, rows):
                found[f"{prefix}{slash}{layer}.{piece.name}"] = piece.cut(row).clone()
        return found

    def join(self, state: State) -> State:
        """A state by the names of the flat parameters, out of what `split` gave or an engine without them wrote."""
        found = dict(state)
        for prefix in sorted({key.rpartition("/")[0] for key in state}):
            for name, (layer, pieces) in self._groups.items():
                slash = "/" if prefix else ""
                keys = {piece.name: f"{prefix}{slash}{layer}.{piece.name}" for piece in pieces}
                values = {piece: found.pop(key) for piece, key in keys.items() if key in found}
                if values:
                    row = join_pieces(pieces, values)
                    found[f"{prefix}{slash}{name}"] = row[None] if name.endswith(".matrices") else row
        return found
