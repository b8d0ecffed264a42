"""Random numbers as pure functions of counters: what a worker draws does not depend on how many there are.

SplitMix64's finaliser over 64-bit counters; a key names the stream. No state, nothing to save.
"""

from __future__ import annotations

import numpy as np

_MIX = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """Hash of `values` with a key; uint64 in, uint64 out.

    Source: Steele, Lea and Flood (2014), SplitMix64.
    """
    with np.errstate(over="ignore"):
        x = values + np.uint64(key & 0xFFFFFFFFFFFFFFFF) * _MIX + _MIX
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def stream_key(*parts: int) -> int:
    """One key from several integers, in their order."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix(key, part + 1)
    return int(key[0])


def uniforms(counters: np.ndarray, key: int) -> np.ndarray:
    """Numbers in [0, 1) with 53 random bits, one for each counter.

    Shapes:
        counters: any shape, integers. returns: the same shape, float64.
    """
    return (mix(np.asarray(counters).astype(np.uint64), key) >> np.uint64(11)) * 2.0**-53


def normals(counters: np.ndarray, key: int) -> np.ndarray:
    """Standard normal numbers, one for each counter.

    Shapes:
        counters: any shape, integers. returns: the same shape, float64.

    Source: Box and Muller (1958).
    """
    radius = np.sqrt(-2 * np.log1p(-uniforms(counters, stream_key(key, 0))))
    return radius * np.cos(2 * np.pi * uniforms(counters, stream_key(key, 1)))
