"""What an embedding engine is, and which one a configuration names.

An engine turns token ids into vectors on one device (or one tensor-parallel group) in one process. It knows nothing
of items, shards, Ray or files of ours. Heavy imports happen when an engine is made, not here.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from genrec_dist.config import SemanticConfig, VllmConfig
from genrec_dist.errors import ConfigError, GenrecError
from genrec_dist.semantic.encoders import ENCODERS, ModelSource, resolve_model
from genrec_dist.semantic.tokens import TextTokenizer


class EmbeddingEngine(Protocol):
    """Token ids -> vectors.

    Attributes:
        dim: width of a vector.
        tokenizer: text -> token ids, cut to what the engine reads.
        batch_rows: most texts of a call that it handles well.
        batch_tokens: most padded tokens of a call that it handles well; 0 where it does not pad.
    """

    dim: int
    tokenizer: TextTokenizer
    batch_rows: int
    batch_tokens: int

    def embed(self, ids: list[list[int]]) -> np.ndarray:
        """Embed the texts as one batch, not normalised.

        Shapes:
            ids: n lists of 1 to max_tokens token ids. returns: (n, dim) float32, in the order of the lists.
        """

    def survives(self, error: Exception) -> bool:
        """True when the engine can go on after this error of `embed`; False when it must be made anew."""


def create_engine(
    settings: SemanticConfig, device: str, num_threads: int, vllm: VllmConfig | None = None
) -> EmbeddingEngine:
    """Load the engine that `settings.engine` names and try it on one short text.

    Args:
        settings: section `semantic` of the configuration.
        device: 'auto', 'cpu' or 'cuda'.
        num_threads: CPU threads of this process; 0 leaves them alone.
        vllm: section `runtime.vllm`.

    Raises:
        ConfigError: the model cannot be found, loaded or run, or there is no such device.
    """
    import torch

    if num_threads:
        torch.set_num_threads(num_threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here", where="runtime.device", got=device, fix="set it to cpu or auto")
    source = resolve_model(settings)
    try:
        engine = _load(settings, source, device, num_threads, vllm or VllmConfig())
        ids, _ = engine.tokenizer(["title: a first item"])
        vector = engine.embed(ids)  # some models load and fail at the first forward pass
        if vector.shape != (1, engine.dim):
            raise ValueError(f"a text gave shape {vector.shape}, expected (1, {engine.dim})")
    except GenrecError:
        raise
    except Exception as error:  # the libraries raise many types for a missing or broken model
        raise ConfigError(
            "embedding model cannot be loaded",
            where="semantic.model",
            got=f"{settings.model}: {type(error).__name__}: {str(error)[:300]}",
            expected=f"one of {', '.join(ENCODERS)}, a folder with config.json, tokenizer and safetensors weights, "
            f"or a hub id, that the engine {settings.engine} can run",
            fix="check the folder; with HF_HUB_OFFLINE=1 a hub id must already be in the local cache",
        ) from error
    return engine


def _load(
    settings: SemanticConfig, source: ModelSource, device: str, num_threads: int, vllm: VllmConfig
) -> EmbeddingEngine:
    if settings.engine == "sentence_transformers":
        from genrec_dist.semantic.sentence_transformers_engine import SentenceTransformersEngine

        return SentenceTransformersEngine(source, settings.max_tokens, settings.dtype, device)
    if settings.engine == "transformers":
        from genrec_dist.semantic.transformers_engine import TransformersEngine

        return TransformersEngine(source, settings.max_tokens, settings.dtype, device)
    if settings.engine == "vllm":
        from genrec_dist.semantic.vllm_engine import VllmEngine

        return VllmEngine(source, settings.max_tokens, settings.dtype, device, num_threads, vllm)
    raise ConfigError("no such embedding engine", where="semantic.engine", got=settings.engine)


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Rows at unit length; NaN stays NaN.

    Shapes:
        vectors: (n, dim) float32. returns: the same.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def plan_batches(lengths: np.ndarray, max_rows: int, max_tokens: int) -> list[np.ndarray]:
    """Rows sorted by length and cut into batches, longest first: little padding, and memory peaks at the start.

    Args:
        lengths: tokens of each text.
        max_rows: most texts of a batch.
        max_tokens: most padded tokens of a batch (its texts x its longest); 0 for no limit. A text that is longer
            by itself is a batch.

    Shapes:
        lengths: (n,) int64. returns: arrays of row numbers that hold every row once.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, first = [], 0
    while first < len(order):
        rows = max_rows
        if max_tokens:
            rows = min(rows, max(1, max_tokens // max(1, int(lengths[order[first]]))))
        batches.append(order[first : first + rows])
        first += rows
    return batches


def batch_limits(engine: EmbeddingEngine, rows: int, tokens: int) -> tuple[int, int]:
    """The user's limits of a batch, where 0 means the engine's own."""
    return rows or engine.batch_rows, tokens or engine.batch_tokens


def quiet_transformers() -> None:
    """Keep the loading bars and advice of transformers off the user's screen."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
