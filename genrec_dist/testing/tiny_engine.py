"""An embedding engine without a model: instant to start, the same vector for the same text everywhere, faults on
demand. For tests of what surrounds engines; it says nothing about embeddings.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np

from genrec_dist.semantic.engine import EmbeddingEngine
from genrec_dist.semantic.tokens import TextTokenizer
from genrec_dist.semantic.worker import EmbedJob, ShardEmbedder

DIM = 32


class ByteTokenizer(TextTokenizer):
    """One token a byte of UTF-8.

    Args:
        max_tokens: bytes that are kept.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def __call__(self, texts: list[str]) -> tuple[list[list[int]], np.ndarray]:
        ids = [list(text.encode()) for text in texts]
        return [row[: self.max_tokens] for row in ids], np.array([len(row) > self.max_tokens for row in ids], bool)


class TinyEngine:
    """Vectors from the bytes of a text. A text that holds one of these words does something else:

    'kill-process' ends the process by SIGKILL, 'lose-engine' raises a MemoryError, after which the engine cannot go
    on, 'raise-error' raises a RuntimeError, 'give-nan' gives a vector with a NaN.

    Args:
        max_tokens: of a text.
        seconds: that a batch takes.
    """

    dim = DIM
    batch_rows = 8
    batch_tokens = 0

    def __init__(self, max_tokens: int = 128, seconds: float = 0.0) -> None:
        self.tokenizer = ByteTokenizer(max_tokens)
        self.seconds = seconds
        self.lost = False

    def embed(self, ids: list[list[int]]) -> np.ndarray:
        """Vectors (n, 32) float32."""
        assert not self.lost, "an engine that is lost must not be asked again"
        time.sleep(self.seconds)
        texts = [bytes(row).decode(errors="replace") for row in ids]
        for text in texts:
            if "kill-process" in text:
                os.kill(os.getpid(), signal.SIGKILL)
            if "lose-engine" in text:
                self.lost = True
                raise MemoryError("the device is gone")
            if "raise-error" in text:
                raise RuntimeError("cannot read this text")
        return np.stack([tiny_vector(text) for text in texts])

    def survives(self, error: Exception) -> bool:
        return not isinstance(error, MemoryError)


def tiny_vector(text: str) -> np.ndarray:
    """The vector of a text, (32,) float32."""
    seed = int.from_bytes(text.encode()[-64:], "little") % 2**32 + len(text)
    vector = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    if "give-nan" in text:
        vector[3] = np.nan
    return vector


class TinyEmbedder(ShardEmbedder):
    """A worker with a `TinyEngine`; stands in for `ShardEmbedder` in Ray Data's actors.

    Args:
        job: what to embed.
    """

    seconds = 0.0

    def __init__(self, job: EmbedJob) -> None:
        super().__init__(job)

    @property
    def engine(self) -> EmbeddingEngine:
        if self._engine is None:
            made: Any = TinyEngine(self.job.settings.max_tokens, self.seconds)
            self._engine = made
            return made
        return self._engine


class SlowTinyEmbedder(TinyEmbedder):
    """A tenth of a second a batch, so that there is something to interrupt."""

    seconds = 0.1


class GpuTinyEmbedder(TinyEmbedder):
    """A thirtieth of a second a batch, in which the host rests, as it does while a GPU works."""

    seconds = 1 / 30
