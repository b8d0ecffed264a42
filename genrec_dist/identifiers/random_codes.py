"""Random codes: every item its own sequence, drawn without regard to what it is. The floor that tokenizers stand above.

Source: PRORec section 4.6 (Figure 8), Random ID.
"""

from __future__ import annotations

import numpy as np

from genrec_dist.identifiers.collisions import check_room
from genrec_dist.training.order import permute


def random_codes(num_items: int, num_clusters: int, num_levels: int, seed: int = 0) -> np.ndarray:
    """Distinct uniform code sequences, (num_items, num_levels) int32.

    Item i has the base-K digits of the i-th number of a permutation of all K ** L sequences that belongs to the seed.

    Raises:
        DataError: fewer sequences than items.
    """
    check_room(num_items, num_clusters, num_levels)
    levels = num_levels
    while num_clusters**levels >= 1 << 62:  # more digits than an integer holds: the first ones are drawn apart
        levels -= 1
    number = permute(np.arange(num_items), num_clusters**levels, seed, 0)
    digits = [number // num_clusters**power % num_clusters for power in range(levels - 1, -1, -1)]
    rng = np.random.default_rng([seed, 1])
    extra = [rng.integers(num_clusters, size=num_items) for _ in range(num_levels - levels)]
    return np.stack(extra + digits, 1).astype(np.int32)
