"""Random numbers as pure functions of counters: what a worker draws does not depend on how many there are.

SplitMix64's finaliser over 64-bit counters; a key names the stream. No state, nothing to save. Numpy arrays and torch
tensors give the same bits, so a batch can be drawn on whichever device it is needed.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)
_MIX = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ALL = (1 << 64) - 1


def _signed(value: int) -> int:
    """An unsigned 64-bit number as the signed one with the same bits: torch has no arithmetic on unsigned ones."""
    value &= _ALL
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Array, bits: int) -> Array:
    """Logical shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(values: Array, key: int) -> Array:
    """Hash of `values` with a key; int64 in, int64 out.

    Source: Steele, Lea and Flood (2014), SplitMix64.
    """
    with np.errstate(over="ignore"):
        x = values + _signed((key & _ALL) * _MIX + _MIX)
        x = (x ^ _shift_right(x, 30)) * _signed(_FIRST)
        x = (x ^ _shift_right(x, 27)) * _signed(_SECOND)
        return x ^ _shift_right(x, 31)


def stream_key(*parts: int) -> int:
    """One key from several integers, in their order."""
    key = np.zeros(1, np.int64)
    for part in parts:
        key = mix(key, part + 1)
    return int(key[0]) & _ALL


def uniforms(counters: Array, key: int) -> Array:
    """Numbers in [0, 1) with 53 random bits, one for each counter.

    Shapes:
        counters: any shape, int64. returns: the same shape, float64.
    """
    bits = _shift_right(mix(counters, key), 11)
    return (bits.to(torch.float64) if isinstance(bits, torch.Tensor) else bits.astype(np.float64)) * 2.0**-53


def normals(counters: np.ndarray, key: int) -> np.ndarray:
    """Standard normal numbers, one for each counter.

    Shapes:
        counters: any shape, int64. returns: the same shape, float64.

    Source: Box and Muller (1958).
    """
    radius = np.sqrt(-2 * np.log1p(-uniforms(counters, stream_key(key, 0))))
    return radius * np.cos(2 * np.pi * uniforms(counters, stream_key(key, 1)))
