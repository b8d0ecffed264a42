"""Bytes before anything runs: of a training, and of a beam search, from the sizes of the model (sizes.py)."""

from __future__ import annotations

import math

from genrec_dist.config import GeneratorConfig, GptConfig, RuntimeConfig
from genrec_dist.studies.sizes import CodebookSize, ModelSize, layer_values

FLOAT = 4


def training_memory(
    size: ModelSize,
    per_worker: int,
    runtime: RuntimeConfig,
    *,
    zero: bool,
    by_owner: tuple[str, ...] = (),
    averaged: bool = False,
) -> dict[str, float]:
    """Bytes a worker holds in training, by kind: float32 parameters, gradients and two Adam moments.

    Args:
        size: the model.
        per_worker: samples of a worker's batch.
        runtime: number of workers and ZeRO stage.
        zero: the engine shards by ZeRO (DeepSpeed): stage 1 shards the moments and its own copy of the parameters,
            stage 2 the gradients too, stage 3 the parameters too.
        by_owner: groups of values that are tables whose rows are shared out over graph partitions (halo rows come on
            top).
        averaged: an average of the weights is kept, sharded like the moments.
    """
    stage = runtime.zero_stage if zero else 0
    workers = runtime.num_workers
    share = lambda groups: sum(-(-n // workers) if name in by_owner else n for name, n in groups.items())  # noqa: E731
    parameters, constants = share(size.parameters), share(size.constants)
    copy = 1 if stage else 0
    return {
        "parameters": FLOAT * parameters / (workers if stage >= 3 else 1),
        "gradients": FLOAT * parameters / (workers if stage >= 2 else 1),
        "optimiser": (2 + copy + averaged) * FLOAT * parameters / (workers if stage >= 1 else 1),
        "constants": FLOAT * constants,
        "activations": FLOAT * size.activation_values * per_worker,
    }


def search_memory(config: GeneratorConfig | GptConfig, codebook: CodebookSize, users: int, width: int) -> float:
    """Bytes that a GPU's allocator reserves for a beam search over a batch, captured or not.

    Each layer holds keys and values of the users' histories. At each level it puts those of the beams into their new
    order and copies them once more with a place added. Both are larger than what any level before has freed, so the
    reserve is the sum over the levels. Beside the layers' keys and values one layer is at work at a time.

    Args:
        config: of the model.
        codebook: trie of the items.
        users: of the batch.
        width: beams of a user.
    """
    depth, beams = codebook.max_depth, users * width
    if isinstance(config, GeneratorConfig):
        layers = config.num_decoder_layers
        source = config.max_history * (1 if config.encoder_input == "item" else depth)
        start = 2 if config.distill_weight and config.distill_position == "start" else 1
    else:
        layers, source, start = config.num_layers, 1 + config.max_history * depth, 0
    copied = sum(2 * (start + level) - 1 for level in range(1, math.ceil(depth)))
    at_work = max(
        beams * layer_values(config.dim, config.ffn_multiplier, config.num_heads, 1, source),
        users * layer_values(config.dim, config.ffn_multiplier, config.num_heads, source, source),
    )
    return FLOAT * (layers * 2 * config.dim * (users * source + beams * copied) + at_work)
