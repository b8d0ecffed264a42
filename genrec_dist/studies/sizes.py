"""Sizes before anything runs: parameters by group, FLOPs, activations, batch arithmetic, by formula from the settings.

Pure arithmetic; imports no torch. The formulas follow generator/model.py, collaborative/fusion.py,
baselines/sasrec.py and baselines/hstu.py, and the tests count the same on the real modules.

Conventions: a multiply-add is 2 FLOPs; only matrix products count; training is 3 x forward (backward twice the
forward); histories are taken as padded to `max_history`, so FLOPs and activations are upper bounds of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from genrec_dist.config import (
    FusionConfig,
    GeneratorConfig,
    GptConfig,
    HstuConfig,
    IdentifierConfig,
    LightgcnConfig,
    OptimConfig,
    SasrecConfig,
)

VALUES_PER_TOKEN = 17
"""Values kept for the backward pass per token, width unit and layer with a 4 x wide feed-forward: 34 bytes at two
bytes a value. Source: Korthikanti et al. (2022), equation 1, without the attention matrix (counted apart)."""

TAUGHT_VALUES = 5.0
"""Values a sample and item that a teacher adds: its probabilities, their sums below the nodes, and what soft labels of
the catalog keep for the backward pass. An H100's allocator had 4.6 (Beauty) and 4.9 (Sports)."""


@dataclass(frozen=True)
class Counts:
    """Size of a catalog.

    Args:
        num_users, num_items, num_interactions: totals.
        lengths: interactions of each user when known; otherwise every user is taken to have the mean.
        note: 'exact', or where an estimate comes from.
    """

    num_users: int
    num_items: int
    num_interactions: int
    lengths: np.ndarray | None = None
    note: str = "exact"

    @property
    def num_prefixes(self) -> int:
        """Training samples: every prefix of every train part, so 3 less than a user's interactions."""
        return int(np.sum(self._pairs()) * (1 if self.lengths is not None else self.num_users))

    @property
    def num_training_pairs(self) -> int:
        """Interactions of the train parts; two a user are held out from 3 on."""
        if self.lengths is None:
            return max(0, self.num_interactions - 2 * self.num_users)
        return int(np.where(self.lengths >= 3, self.lengths - 2, self.lengths).sum())

    def num_windows(self, width: int) -> int:
        """Training rows of models with a loss at every position: windows of at most `width` inputs."""
        windows = np.ceil(self._pairs() / width).sum()
        return int(windows * (1 if self.lengths is not None else self.num_users))

    def _pairs(self) -> np.ndarray:
        """(input, next item) pairs of each user, or of the mean user. Two items are held out from 3 on."""
        if self.lengths is None:
            return np.array([max(self.num_interactions / max(self.num_users, 1) - 3, 0.0)])
        train = np.where(self.lengths >= 3, self.lengths - 2, self.lengths)
        return np.maximum(train - 1, 0)


@dataclass(frozen=True)
class CodebookSize:
    """Shape of a codebook's trie.

    Args:
        num_nodes: nodes, root included.
        max_depth: longest code; may be a mean where costs are asked for and not sizes.
        num_codes: largest code + 1.
        widths: most children of a node at each level; likewise.
        note: 'exact', or how it was estimated.
    """

    num_nodes: int
    max_depth: float
    num_codes: int
    widths: tuple[float, ...]
    note: str = "exact"


def expected_codebook(config: IdentifierConfig, num_items: int) -> CodebookSize:
    """Codebook when codes of a level are used alike. Hierarchical k-means goes deeper where they are not.

    The widest node is taken as four times the mean one, unless the clustering is balanced.
    """
    branch = config.num_clusters
    if config.tokenizer == "hierarchical_kmeans":
        depth = 1
        while branch**depth < num_items:
            depth += 1
    else:
        depth = config.num_levels + (config.tokenizer in ("rqvae", "residual_kmeans") and config.collisions == "dedup")
    inner = [min(branch**level, num_items) for level in range(1, depth)]
    spread = 1 if config.balanced else 4
    widths = tuple(min(branch, num_items, spread * math.ceil(num_items / branch**level)) for level in range(depth))
    return CodebookSize(1 + sum(inner) + num_items, depth, min(branch, num_items), widths, "equal clusters assumed")


@dataclass(frozen=True)
class ModelSize:
    """What one gradient loop holds and computes.

    Args:
        parameters: trainable parameters by group.
        constants: values held without gradient, by group.
        forward_flops: FLOPs of the forward pass of one sample.
        activation_values: values kept for the backward pass of one sample.
        padded_values: of these, what places of padding add on a GPU, whose loss is computed there, too.
    """

    parameters: dict[str, int]
    constants: dict[str, int] = field(default_factory=dict)
    forward_flops: float = 0.0
    activation_values: float = 0.0
    padded_values: float = 0.0

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def training_flops(self) -> float:
        """FLOPs of one sample in training: forward, and twice that backward."""
        return 3 * self.forward_flops


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


def attention_parameters(dim: int) -> int:
    """Query, key, value and output projections: 4 d^2 + 4 d."""
    return 4 * linear(dim, dim)


def ffn_parameters(dim: int, multiplier: int) -> int:
    """Two linear layers: 2 m d^2 + (m + 1) d."""
    return linear(dim, multiplier * dim) + linear(multiplier * dim, dim)


def encoder_layer_parameters(dim: int, multiplier: int) -> int:
    """Self-attention, feed-forward, two norms."""
    return attention_parameters(dim) + ffn_parameters(dim, multiplier) + 2 * 2 * dim


def decoder_layer_parameters(dim: int, multiplier: int) -> int:
    """Self- and cross-attention, feed-forward, three norms."""
    return 2 * attention_parameters(dim) + ffn_parameters(dim, multiplier) + 3 * 2 * dim


def encoder_layer_flops(dim: int, multiplier: int, length: float) -> float:
    """4 projections, feed-forward, scores and weighted sum over `length` places."""
    return 2.0 * length * (4 + 2 * multiplier) * dim**2 + 4.0 * length**2 * dim


def decoder_layer_flops(dim: int, multiplier: int, length: float, source: float) -> float:
    """As the encoder layer, plus cross-attention to `source` places."""
    cross = 2.0 * (2 * length + 2 * source) * dim**2 + 4.0 * length * source * dim
    return encoder_layer_flops(dim, multiplier, length) + cross


def layer_values(dim: int, multiplier: int, heads: int, length: float, source: float) -> float:
    wide = VALUES_PER_TOKEN + 2 * (multiplier - 4)
    return length * dim * wide + 2.0 * heads * length * source


def _times_flops(num_bumps: int, dim: int, places: float) -> float:
    """The linear layer behind the bumps of `TimeEncoding`, at every place of a history."""
    return 2.0 * num_bumps * dim * places


def generator_size(config: GeneratorConfig, codebook: CodebookSize, num_items: int, width: int) -> ModelSize:
    """PRORec Stage II.

    Args:
        config: generator section.
        codebook: trie of the items.
        num_items: N.
        width: columns of the integrated embeddings.
    """
    dim, depth, multiplier = config.dim, codebook.max_depth, config.ffn_multiplier
    from_items, child, distill = config.encoder_input == "item", config.head == "child", bool(config.distill_weight)
    inputs = config.max_history * dim + (depth + 2) * dim + dim + 2 * dim
    inputs += 0 if from_items and child else depth * codebook.num_codes * dim
    inputs += linear(width, dim) * (from_items + child)
    inputs += linear(config.time_bumps, dim) if config.time_bumps else 0
    parameters = {
        "inputs": inputs,
        "encoder": config.num_encoder_layers * encoder_layer_parameters(dim, multiplier) + 2 * dim,
        "decoder": config.num_decoder_layers * decoder_layer_parameters(dim, multiplier) + 2 * dim,
        "head": linear(dim, width) if child else depth * linear(dim, codebook.num_codes),
        "distillation": dim + linear(dim, width) if distill else 0,
    }
    constants = {"integrated embeddings": num_items * width}
    if child:
        group = parameters if config.node_embedding_rate else constants
        group["node embeddings"] = codebook.num_nodes * width
    if from_items:
        group = parameters if config.item_embedding_rate else constants
        group["item embeddings"] = num_items * width

    source = config.max_history * (1 if from_items else depth)
    at_end = distill and config.distill_position == "end"
    target = depth + 2 if at_end else depth + distill  # the last code has a place only before a token
    scored = sum(codebook.widths)
    flops = config.num_encoder_layers * encoder_layer_flops(dim, multiplier, source)
    flops += config.num_decoder_layers * decoder_layer_flops(dim, multiplier, target, source)
    flops += 2.0 * width * dim * (source * from_items + depth * child)
    flops += 2.0 * (depth * dim * width + width * scored) if child else 2.0 * depth * dim * codebook.num_codes
    values = config.num_encoder_layers * layer_values(dim, multiplier, config.num_heads, source, source)
    values += config.num_decoder_layers * (
        layer_values(dim, multiplier, config.num_heads, target, target)
        + 6 * target * dim + 2 * source * dim + 2.0 * config.num_heads * target * source
    )  # fmt: skip
    # Gathered children below the first level are a (children, width) block a sample, kept raw and normalised.
    values += 2.0 * width * sum(codebook.widths[1:]) + 3.0 * scored if child else 3.0 * depth * codebook.num_codes
    flops += _times_flops(config.time_bumps, dim, config.max_history)
    values += config.max_history * config.time_bumps
    if distill:
        candidates = config.distill_negatives + 1 if config.distill_negatives else num_items
        flops += 2.0 * dim * width + 2.0 * width * (config.distill_negatives or num_items)
        values += 3.0 * candidates
    if config.teacher_weight:
        values += TAUGHT_VALUES * num_items
        constants["teacher's table"] = num_items * width
    return ModelSize({k: round(v) for k, v in parameters.items() if v}, constants, flops, values)


def gpt_size(config: GptConfig, codebook: CodebookSize, width: int, mean_targets: float) -> ModelSize:
    """Decoder-only generator with a loss at every position of a row.

    Args:
        config: gpt section.
        codebook: trie of the items.
        width: columns of the table that the child head starts from.
        mean_targets: targets of a row; layers run over the padded row, heads over its own items.
    """
    dim, depth, multiplier, codes = config.dim, codebook.max_depth, config.ffn_multiplier, codebook.num_codes
    child = config.head == "child"
    places, items = config.max_history + 1, mean_targets + 1
    scored = sum(codebook.widths)
    parameters = {
        "node embeddings": codebook.num_nodes * width if child else 0,
        "inputs": depth * (codes + 1) * dim + depth * dim + places * dim + dim,
        "layers": config.num_layers * encoder_layer_parameters(dim, multiplier) + 2 * dim,
        "head": linear(dim, width) if child else depth * linear(dim, codes),
    }
    flops = config.num_layers * encoder_layer_flops(dim, multiplier, places * depth)
    flops += items * (2.0 * depth * dim * width + 2.0 * width * scored if child else 2.0 * depth * dim * codes)
    values = config.num_layers * layer_values(dim, multiplier, config.num_heads, places * depth, places * depth)
    of_item = 2.0 * width * sum(codebook.widths[1:]) + 3.0 * scored if child else 3.0 * depth * codes
    return ModelSize(
        {k: round(v) for k, v in parameters.items() if v},
        {},
        flops,
        values + items * of_item,
        (places - items) * of_item,
    )


def _sasrec_backbone(dim: int, max_history: int, num_layers: int) -> int:
    return max_history * dim + num_layers * encoder_layer_parameters(dim, 4) + 2 * dim


def fusion_size(config: FusionConfig, num_items: int, semantic_dim: int, mean_targets: float = 1.0) -> ModelSize:
    """PRORec Stage I.

    Args:
        config: fusion section.
        num_items: N.
        semantic_dim: columns of E_S.
        mean_targets: targets of a row, for the self-attentive backbone with a loss at every position.
    """
    dim, history, batch = config.dim, config.max_history, config.optim.batch_size
    full = config.loss == "full_softmax"
    candidates = num_items if full else batch + config.num_negatives
    distinct = num_items if full else min(num_items, batch * (history + 2) + config.num_negatives)
    unit = linear(4 * dim, 36) + 1 + linear(36, 1) if config.attention == "mlp" else 0
    projections = 3 if config.attention == "dot" else 2  # state and value; the key serves the bilinear unit only
    din = history * dim + 2 * dim + projections * linear(dim, dim) + linear(dim, 1) + 1 + unit
    din += linear(dim, 2 * dim) + linear(2 * dim, dim)
    is_din = config.backbone == "din"
    parameters = {
        "item embeddings": num_items * dim,
        "adaption layer": linear(semantic_dim, dim) + linear(dim, 2 * dim),
        "backbone": din if is_din else _sasrec_backbone(dim, history, config.num_layers) + 2 * dim * config.input_norm,
    }
    if config.time_bumps:
        parameters["times"] = linear(config.time_bumps, dim)
    adaption = 2.0 * distinct * (semantic_dim * dim + 2 * dim**2) / batch  # the table is made once a batch
    alignment = 2.0 * min(batch, num_items) * dim
    if is_din:
        activation = 2.0 * (4 * dim * 36 + 36) if config.attention == "mlp" else 2.0 * dim
        flops = 2.0 * history * (2 * dim**2 + dim) + 8.0 * dim**2
        flops += 2.0 * history * dim**2 if config.attention == "dot" else 0.0
        flops += history * candidates * (activation + 2.0 * dim) + 2.0 * dim * candidates
        # Scores, weights, value products and their product stay alive for the backward pass.
        values = (5.0 + (4 * dim + 72 if config.attention == "mlp" else 0)) * history * candidates
        values += 10.0 * history * dim + 3.0 * candidates
    else:
        flops = config.num_layers * encoder_layer_flops(dim, 4, history) + 2.0 * dim * candidates * mean_targets
        values = config.num_layers * layer_values(dim, 4, config.num_heads, history, history)
        values += 3.0 * candidates * mean_targets
    values += distinct * 8.0 * dim / batch + history * config.time_bumps
    flops += _times_flops(config.time_bumps, dim, history)
    return ModelSize(
        parameters, {"semantic embeddings": num_items * semantic_dim}, flops + adaption + alignment, values
    )


def sasrec_size(config: SasrecConfig, num_items: int, mean_targets: float = 1.0) -> ModelSize:
    """SASRec reference with full cross-entropy at every position of a row.

    Args:
        mean_targets: targets of a row; layers run over the padded row, logits over its targets only.
    """
    dim, history = config.dim, config.max_history
    parameters = {
        "item embeddings": num_items * dim,
        "backbone": _sasrec_backbone(dim, history, config.num_layers) + 2 * dim * config.input_norm,
    }
    flops = config.num_layers * encoder_layer_flops(dim, 4, history) + 2.0 * dim * num_items * mean_targets
    values = config.num_layers * layer_values(dim, 4, config.num_heads, history, history)
    logits = 3.0 * num_items
    return ModelSize(parameters, {}, flops, values + logits * mean_targets, logits * (history - mean_targets))


def hstu_size(config: HstuConfig, num_items: int, mean_targets: float = 1.0) -> ModelSize:
    """HSTU with full cross-entropy at every place of a row; arguments as of `sasrec_size`.

    A layer has five D x D products a place, and scores and weighted sum over all places.
    """
    dim, places, layers = config.dim, config.max_history, config.num_layers
    parameters = {
        "item embeddings": num_items * dim,
        "inputs": places * dim + layers * (config.position_buckets + config.time_buckets + 1),
        "layers": layers * (4 * dim**2 + linear(dim, dim)) + 2 * dim * (config.similarity == "inner"),
    }
    flops = layers * (2.0 * places * 5 * dim**2 + 4.0 * places**2 * dim) + 2.0 * dim * num_items * mean_targets
    # A place keeps input, norm, projection before and after SiLU, values read, their norm, gated ones, a mask: 14 D.
    values = layers * (14.0 * places * dim + (3.0 * config.num_heads + 1) * places**2)
    logits = 3.0 * num_items
    return ModelSize(parameters, {}, flops, values + logits * mean_targets, logits * (places - mean_targets))


def lightgcn_size(config: LightgcnConfig, counts: Counts) -> ModelSize:
    """LightGCN; its only products are the scores, so additions over neighbours are counted as well, one FLOP each.

    In the full mode every batch propagates over the whole graph, in the sampled mode over its fan-outs.
    """
    dim, batch = config.dim, config.optim.batch_size
    nodes = counts.num_users + counts.num_items
    pairs = counts.num_training_pairs
    shared = config.loss == "sampled_softmax"
    read = (2 + config.num_negatives / (batch if shared else 1)) * batch
    if config.mode == "full":
        additions = 2.0 * config.num_layers * pairs * dim / batch
        values = 2.0 * nodes * dim / batch
    else:
        additions, values, width = 0.0, 0.0, min(read, nodes)
        for fanout in config.fanouts:
            width = min(width * (1 + fanout), nodes)
            additions += width * dim / batch
            values += width * dim / batch
    return ModelSize({"node embeddings": nodes * dim}, {}, additions + 2.0 * dim * (1 + config.num_negatives), values)


@dataclass(frozen=True)
class Batches:
    """Batch arithmetic of one gradient loop."""

    samples: int
    batch_size: int
    per_worker: int
    steps_per_epoch: int
    epochs: int
    total_steps: int


def batch_arithmetic(samples: int, optim: OptimConfig, num_workers: int) -> Batches:
    """Steps of a loop; the last batch of an epoch may be smaller."""
    steps = -(-samples // optim.batch_size)
    return Batches(
        samples, optim.batch_size, optim.batch_size // num_workers, steps, optim.epochs, steps * optim.epochs
    )
