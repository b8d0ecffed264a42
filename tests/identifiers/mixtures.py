"""Made-up rows for tests of k-means."""

from __future__ import annotations

import numpy as np


def mixture(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Rows about 20 well separated centres, (n, dim) float32."""
    rng = np.random.default_rng(seed)
    centres = 4 * rng.standard_normal((20, dim), np.float32)
    return (centres[rng.integers(20, size=n)] + rng.standard_normal((n, dim), np.float32)).astype(np.float32)
