"""How much of each modality an embedding table keeps (PRORec equations 9 and 10), and the naive concatenation.

Works on finished tables in memory; trains nothing, reads and writes nothing.
"""

from __future__ import annotations

import numpy as np

from genrec_dist.errors import DataError

ROUNDING = 1e-9
"""Divergences (nats) below this are rounding, not a preference for one modality."""


def modality_similarity(
    semantic: np.ndarray,
    collaborative: np.ndarray,
    final: np.ndarray,
    *,
    temperature: float = 0.07,
    max_items: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Proportional similarity of the semantic and the collaborative table to the final one.

    similarity_semantic = 1 - KL(S || E) / (KL(S || E) + KL(C || E)), and the same with S and C exchanged; the two
    add up to 1. Where both divergences are 0 neither modality is nearer, and both are .5.

    Args:
        semantic: S, item text embeddings.
        collaborative: C, item embeddings learned from interactions.
        final: E, the table that is judged.
        temperature: of the softmax that makes a distribution of the similarities.
        max_items: items compared; more than these are sampled.
        seed: of the sample.

    Shapes:
        semantic, collaborative, final: (num_items, any width) float; row i is item i in each.

    Returns:
        `semantic`, `collaborative` (add up to 1), `kl_semantic`, `kl_collaborative` (nats), `items` compared.

    Raises:
        DataError: tables of different length, or fewer than 3 items that have all three embeddings.

    Source:
        PRORec, equations 9 and 10. The paper does not say of what the KL divergence is taken. Here the distribution
        of a table at item i is the softmax over the cosine similarities of i to the other compared items, and KL is
        averaged over the items: defined for tables of different width, and blind to rotation and scale. Rows of
        zeros (items without an embedding) are left out.
    """
    tables = [np.asarray(t) for t in (semantic, collaborative, final)]
    if len({len(t) for t in tables}) != 1:
        raise DataError("embedding tables have different numbers of items", got=[len(t) for t in tables])
    present = np.flatnonzero(np.logical_and.reduce([np.any(t != 0, axis=1) for t in tables]))
    if len(present) < 3:
        raise DataError("too few items to compare tables", got=len(present), expected="3 or more")
    if len(present) > max_items:
        present = np.sort(np.random.default_rng(seed).choice(present, max_items, replace=False))
    log_s, log_c, log_e = (_neighbour_log_distribution(t[present], temperature) for t in tables)
    kl_semantic, kl_collaborative = _mean_kl(log_s, log_e), _mean_kl(log_c, log_e)
    total = kl_semantic + kl_collaborative
    share = 1.0 - kl_semantic / total if total > ROUNDING else 0.5
    return {
        "semantic": share,
        "collaborative": 1.0 - share,
        "kl_semantic": kl_semantic,
        "kl_collaborative": kl_collaborative,
        "items": len(present),
    }


def _neighbour_log_distribution(table: np.ndarray, temperature: float) -> np.ndarray:
    """Log of the softmax over each item's cosine similarities to the others.

    Shapes:
        table: (num_items, dim).
        returns: (num_items, num_items - 1) float64, the item itself left out.
    """
    unit = table.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    num_items = len(unit)
    others = ~np.eye(num_items, dtype=bool)
    logits = (unit @ unit.T / temperature)[others].reshape(num_items, num_items - 1)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _mean_kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q) in nats, averaged over rows; never below 0 by rounding."""
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()))


def concat_pca(semantic: np.ndarray, collaborative: np.ndarray) -> np.ndarray:
    """The naive fusion: semantic embeddings reduced to the collaborative width by PCA, then concatenated.

    Neither part is scaled, which is what lets one modality dominate.

    Shapes:
        semantic: (num_items, semantic_dim) float.
        collaborative: (num_items, dim) float.
        returns: (num_items, min(dim, semantic_dim) + dim) float32, the semantic part first.

    Raises:
        DataError: tables of different length.

    Source:
        PRORec, section 4.3.
    """
    if len(semantic) != len(collaborative):
        raise DataError(
            "embedding tables have different numbers of items", got=len(semantic), expected=len(collaborative)
        )
    reduced = reduce_by_pca(semantic, collaborative.shape[1])
    return np.concatenate([reduced, collaborative], axis=1, dtype=np.float32, casting="same_kind")


def reduce_by_pca(table: np.ndarray, width: int) -> np.ndarray:
    """The first principal components of a table, not scaled.

    The sign of a principal component is free; the one that makes its largest loading positive is taken.

    Shapes:
        table: (num_items, dim) float. Returns (num_items, min(width, dim)) float64.
    """
    centred = table.astype(np.float64)
    centred -= centred.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    components = vectors[:, ::-1][:, :width]
    largest = np.abs(components).argmax(axis=0)
    return centred @ (components * np.sign(components[largest, np.arange(components.shape[1])]))
