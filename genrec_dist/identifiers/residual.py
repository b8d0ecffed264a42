"""Residual k-means: L codes an item, each level clustering what the levels above it left.

Source: RK-Means in GRID (Ju et al., 2025); the start of residual quantizers since Juang and Gray (1982).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genrec_dist.artifacts.files import write_atomic
from genrec_dist.identifiers.crew import LocalCrew
from genrec_dist.identifiers.hierarchical import Crew, child_seed, kmeans_log, resumed_kmeans
from genrec_dist.identifiers.kmeans import PLAIN, KMeansOptions, KMeansState


@dataclass
class ResidualCodes:
    """Codes and the vectors behind them.

    Args:
        logs: of each level's k-means.

    Shapes:
        codes: (n, L) int32. codebooks: (L, K, dim) float32.
    """

    codes: np.ndarray
    codebooks: np.ndarray
    logs: list[dict[str, Any]]


def residual_kmeans(
    source: Any,
    num_levels: int,
    num_clusters: int,
    *,
    seed: int = 0,
    options: KMeansOptions = PLAIN,
    crew: Crew | None = None,
    scratch: Path | None = None,
    on_iteration: Callable[[int, KMeansState], None] | None = None,
) -> ResidualCodes:
    """Code all rows; with fewer distinct rows than codes, the codes left over are copies of rows.

    Args:
        source: rows, as the crew understands them.
        num_levels, num_clusters: L, K.
        seed: of all levels.
        options: of k-means.
        crew: who computes; default: this process, in one thread.
        scratch: folder for what a killed build goes on from; None keeps nothing.
        on_iteration: called after each iteration of a level.
    """
    team: Crew = crew or LocalCrew()
    points = team.points(source)
    codes, codebooks, logs = [], [], []
    for level in range(num_levels):
        done = None if scratch is None else scratch / f"level-{level}.safetensors"
        found = None if done is None else _load(done)
        if found is None:
            file = None if scratch is None else scratch / f"iteration-{level}.safetensors"
            note = None if on_iteration is None else partial(on_iteration, level)
            result = resumed_kmeans(points, num_clusters, options, child_seed(seed, level), file, note)
            found = (result.labels, result.centroids, kmeans_log(result, points.num_rows))
            if done is not None:
                arrays = {"labels": found[0], "centroids": found[1]}
                write_atomic(done, save(arrays, {"log": json.dumps(found[2])}))
        codes.append(found[0])
        codebooks.append(found[1])
        logs.append({"level": level, **found[2]})
        if level + 1 < num_levels:
            points = team.descend(points, found[0], found[1])
    return ResidualCodes(np.stack(codes, 1), np.stack(codebooks), logs)


def _load(file: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]] | None:
    try:
        with safe_open(file, "np") as found:
            return found.get_tensor("labels"), found.get_tensor("centroids"), json.loads(found.metadata()["log"])
    except (FileNotFoundError, SafetensorError):
        return None
