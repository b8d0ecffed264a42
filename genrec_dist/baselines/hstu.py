"""HSTU with full-catalog cross-entropy: attention without a softmax, gated, with a bias of places and times.

A layer reads x and adds to it, with U, V, Q, K = SiLU(W norm(x)) split in four (equation 1):
    A = SiLU(Q K^T + rab) / n over places that are not later (equation 2),  y = W_o (norm(A V) * U)  (equation 3).
rab is one number for the distance of two places plus one for the bucketed logarithm of the time between them. The same
harness as SASRec: a loss at every place of a window, all items ranked. Single device; the stage is hstu_stage.py.

Shape legend: B batch, W places, D width, H heads, E width of a head, L layers.
Source: Zhai et al. (2024), arXiv 2402.17152, and what its public research code adds: 1 / n with n the longest history,
norms without parameters, item embeddings times sqrt(D), learned places beside the relative ones, buckets of width .301
in the natural logarithm of seconds, biases of its own for every layer, shared by its heads. Deviations: one bucket for
unknown times; the time of a query is that of its own item unless `query_time` says otherwise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from genrec_dist.catalog.dataset import NO_TIMESTAMP
from genrec_dist.collaborative.losses import full_softmax, scale_of, similarity
from genrec_dist.config import HstuConfig
from genrec_dist.generator.transformer import Layer, scale_residuals

BUCKET_WIDTH = 0.301
"""Of the natural logarithm of seconds: 64 buckets reach seven years."""
EPS = 1e-6


class HstuLayer(Layer):
    """One layer of HSTU.

    Args:
        dim: D, a multiple of `num_heads`; queries, keys and values of all heads are as wide together.
        num_heads: H.
        dropout: of the gated values, in training.
        init_std: of the input projection; the output projection starts Xavier uniform.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, init_std: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.uvqk = nn.Linear(dim, 4 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        nn.init.normal_(self.uvqk.weight, std=init_std)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def residual_outputs(self) -> list[nn.Linear]:
        return [self.out]

    def carry(self, x_BWD: torch.Tensor, bias_BWW: torch.Tensor, causal_WW: torch.Tensor) -> torch.Tensor:
        """The layer's output.

        Args:
            bias_BWW: rab.
            causal_WW: 1 / n where a place (row) may look at another (column), else 0.
        """
        batch, length, dim = x_BWD.shape
        projected = F.silu(self.uvqk(F.layer_norm(x_BWD, (dim,), eps=EPS)))
        u_BWD, *rest = projected.chunk(4, -1)
        v, q, k = (part.view(batch, length, self.num_heads, -1).transpose(1, 2) for part in rest)
        weight = F.silu(q @ k.transpose(2, 3) + bias_BWW[:, None]) * causal_WW
        read_BWD = (weight.to(v.dtype) @ v).transpose(1, 2).reshape(batch, length, dim)
        gated = u_BWD * F.layer_norm(read_BWD, (dim,), eps=EPS)
        return x_BWD + self.out(F.dropout(gated, self.dropout, self.training))


class HstuModel(nn.Module):
    """Item table and HSTU layers.

    Args:
        config: hstu section.
        num_items: rows of the table.
    """

    def __init__(self, config: HstuConfig, num_items: int) -> None:
        super().__init__()
        self.config, dim, layers = config, config.dim, config.num_layers
        self.item = nn.Embedding(num_items, dim)
        self.position = nn.Embedding(config.max_history, dim)
        self.place_bias = nn.Embedding(config.position_buckets, layers)
        self.time_bias = nn.Embedding(config.time_buckets + 1, layers)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            HstuLayer(dim, config.num_heads, config.dropout, config.init_std) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim) if config.similarity == "inner" else nn.Identity()
        for table in (self.item, self.place_bias, self.time_bias):
            nn.init.normal_(table.weight, std=config.init_std)
        nn.init.normal_(self.position.weight, std=dim**-0.5)
        if config.init == "depth_scaled":
            scale_residuals(self.layers)

    whole_parameters = ("item.weight",)

    def biases(self, times: torch.Tensor) -> torch.Tensor:
        """rab of every layer: row i, column j for place i looking at place j; later places hold anything.

        Args:
            times: seconds of each place and, behind the last, of the item that comes next; NO_TIMESTAMP where unknown.

        Shapes:
            times: (B, W + 1) int64. Returns (L, B, W, W).
        """
        length = times.shape[1] - 1
        own = times[:, :-1]
        asked = times[:, 1:] if self.config.query_time == "target" else own
        place = torch.arange(length, device=times.device)
        distance = (place[:, None] - place).clamp(0, self.config.position_buckets - 1)
        bias = self.place_bias(distance) + self.time_bias(
            time_buckets(asked[:, :, None], own[:, None, :], self.config.time_buckets)
        )
        return bias.movedim(-1, 0)

    def states(self, history: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """User state after each place, (B, W, D). Right padding needs no mask: no real place looks at it."""
        dim, length = self.config.dim, history.shape[1]
        place = torch.arange(length, device=history.device)
        x_BWD = self.dropout(self.item(history) * math.sqrt(dim) + self.position(place))
        causal_WW = x_BWD.new_ones(length, length).tril() / self.config.max_history
        for layer, bias_BWW in zip(self.layers, self.biases(times)):
            x_BWD = layer(x_BWD, bias_BWW, causal_WW)
        return self.norm(x_BWD)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Cross-entropy over the catalog at every place of the windows.

        Args:
            batch: history, targets (B, W) int64, mask (B, W) bool, times (B, W + 1) int64, and count, of the targets of
                the global batch over the number of workers.
        """
        config, mask = self.config, batch["mask"]
        states, targets = self.states(batch["history"], batch["times"]), batch["targets"]
        if states.device.type == "cpu":
            states, targets = states[mask], targets[mask]
        else:  # rows of padding cost less than waiting for the number of the others
            states, targets = states.flatten(0, 1), targets.masked_fill(~mask, -100).flatten()
        logits = similarity(states, self.item.weight, config.similarity)
        logits = logits * scale_of(config.similarity, config.temperature)
        return {"loss": full_softmax(logits, targets) / batch["count"]}

    @torch.no_grad()
    def score_catalog(self, history: torch.Tensor, mask: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Scores of all items for each history, (B, num_items); arguments as in `forward`."""
        last = (mask.sum(1) - 1).clamp(min=0)
        states = self.states(history, times)[torch.arange(len(history), device=history.device), last]
        return similarity(states, self.item.weight, self.config.similarity)


def time_buckets(a: torch.Tensor, b: torch.Tensor, count: int) -> torch.Tensor:
    """Bucket of the time between two moments: floor(ln(max(1, |a - b|)) / .301), at most `count` - 1.

    Where either is NO_TIMESTAMP it is `count`.

    Shapes:
        a, b: int64 seconds, broadcast against each other. Returns int64.
    """
    unknown = (a == NO_TIMESTAMP) | (b == NO_TIMESTAMP)
    apart = (a - b).masked_fill(unknown, 0).abs().clamp(min=1)
    bucket = (apart.float().log() / BUCKET_WIDTH).long().clamp(max=count - 1)
    return bucket.masked_fill(unknown, count)
