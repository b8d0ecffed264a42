"""Made-up trials of a layer sweep with planted curves: what a sweep would hand over, without training anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from genrec_dist.studies.scaling.trials import CurvePoint, Trial

DEPTHS = (1, 2, 4, 8, 12, 16, 24, 32)
LAYER, TABLES = 200_000, 1_600_000
Curve = Callable[[float], float]


def power(e: float, a: float, alpha: float) -> Curve:
    """e + a (layers)^-alpha, planted; falling for a > 0."""
    return lambda depth: e + a * depth**-alpha


LOSS_CURVE, NDCG_CURVE = power(8.0, 2.0, 0.5), power(0.06, -0.02, 0.6)


def trial(arm: str, depth: int, seed: int, bits: float | None, ndcg: float, **more) -> Trial:
    """A finished run."""
    layers = LAYER * depth
    flops = 6.0 * layers * 4e8
    points = tuple(
        CurvePoint(
            epoch=float(epoch),
            step=100 * epoch,
            flops=flops * epoch / 8,
            train_loss=(bits or 9) + 3 / epoch,
            bits_per_item=bits + 2.5 / epoch**1.5 if bits else None,
            metrics={"ndcg@10": ndcg * (1 - 0.5 / epoch)},
        )
        for epoch in range(1, 9)
    )
    made = {
        "name": f"{arm}-l{depth}-s{seed}",
        "arm": arm,
        "depth": depth,
        "seed": seed,
        "state": "finished",
        "num_parameters": {"layers": layers, "non_embedding": layers + 20_000, "total": layers + TABLES},
        "train_flops": flops,
        "bits_per_item": bits,
        "metrics": {"ndcg@20": ndcg, "recall@20": 1.9 * ndcg},
        "curve": points,
        "tokens_per_second": 4e6 / depth,
        "peak_memory_bytes": int(2**30 * (1 + 0.2 * depth)),
        "mfu": 0.1 + 0.2 * (1 - 1 / depth),
        "hyperparameters": {"generator.num_decoder_layers": depth, "generator.optim.learning_rate": 1e-3 / depth**0.5},
        "hardware": "1x H100 80GB",
        "commit": "0123456789abcdef",
    }
    return Trial(**(made | more))


def sweep(
    arm: str = "prorec",
    bits: Curve | None = LOSS_CURVE,
    ndcg: Curve = NDCG_CURVE,
    noise: float = 0.004,
    depths: Sequence[int] = DEPTHS,
    seeds: int = 3,
    seed: int = 0,
    seed_effect: float = 0.0,
) -> list[Trial]:
    """Finished runs of every depth and seed.

    `noise` and `seed_effect` are standard deviations of a log, of a run's own and of what a seed adds at every depth;
    the latter is 0 in the mean of the sweep's seeds.
    """
    rng = np.random.default_rng(seed)
    added = np.random.default_rng((seed, 1)).normal(0, seed_effect, (seeds, 2))
    added -= added.mean(axis=0)
    made = []
    for depth in depths:
        for s in range(seeds):
            one, two = np.exp(added[s] + rng.normal(0, noise, 2))
            made.append(trial(arm, depth, s, bits(depth) * one if bits else None, ndcg(depth) * two))
    return made
