"""Sections of the tokenizers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genrec_dist.config.section import OptimConfig, Section


class RqvaeOptim(OptimConfig):
    """As OptimConfig, with what fits a small autoencoder over a table: large batches, many epochs, float32."""

    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    batch_size: int = Field(1024, ge=1, description="items of a batch, over all workers")
    epochs: int = Field(300, ge=1)
    evaluate_every: int = Field(25, ge=1, description="epochs between validations")
    patience: int = Field(1000, ge=1, description="validations without more variance explained before stopping")
    precision: Literal["fp32"] = "fp32"
    length_buckets: int = Field(0, ge=0, le=0, description="always 0: items have no length")
    ema_decay: float = Field(0.0, ge=0, le=0, description="always 0: an average of the weights has no codebooks")


class RqvaeConfig(Section):
    """Residual-quantised autoencoder over one or two embedding tables (CSJ-ID section 3.2, TIGER)."""

    semantic_weight: float = Field(0.5, ge=0, le=1, description="lambda: share of the first of two inputs")
    hidden: list[int] = Field([256], description="widths of the encoder's hidden layers; the decoders mirror them")
    latent_dim: int = Field(64, ge=1)
    commit_weight: float = Field(0.25, ge=0, description="of the commitment loss; the paper's is 1")
    commitment: Literal["total", "levels"] = Field(
        "levels", description="total: encoder output to the sum of codes (paper); levels: each residual to its code"
    )
    codebook: Literal["gradient", "ema"] = Field("ema", description="how codes learn: moving averages or gradients")
    ema_decay: float = Field(0.99, ge=0, lt=1)
    kmeans_start: bool = Field(True, description="codes start as k-means of the first residuals, level by level")
    kmeans_items: int = Field(65_536, ge=1, description="items of that k-means at most")
    revive_below: float = Field(
        0.05, ge=0, lt=1, description="a code used less than this share of an equal use is given to an item's residual"
    )
    sinkhorn_epsilon: float = Field(
        0.0, ge=0, description="> 0: the last level is assigned by Sinkhorn in training, so that codes are used alike"
    )
    sinkhorn_iterations: int = Field(50, ge=1)
    optim: RqvaeOptim = RqvaeOptim()


class IdentifierConfig(Section):
    """Item embeddings -> one code sequence an item."""

    tokenizer: Literal["hierarchical_kmeans", "residual_kmeans", "rqvae", "random"] = "hierarchical_kmeans"
    num_clusters: int = Field(256, ge=2, description="K, codes of a level")
    num_levels: int = Field(4, ge=1, description="L, levels of residual_kmeans, rqvae and random")
    balanced: bool = Field(False, description="k-means: clusters of equal size")
    metric: Literal["euclidean", "cosine"] = Field("euclidean", description="of k-means; cosine: rows at length 1")
    iterations: int = Field(30, ge=1, description="of k-means, at most")
    tolerance: float = Field(1e-4, ge=0, lt=1, description="k-means ends when its objective falls by a smaller share")
    num_starts: int = Field(1, ge=1, description="of k-means; the best counts")
    start: Literal["auto", "plus_plus", "parallel"] = Field(
        "auto", description="of k-means: k-means++, k-means||, or by the number of rows"
    )
    collisions: Literal["dedup", "sinkhorn", "nearest_free"] = Field(
        "dedup",
        description="rqvae and residual_kmeans, items that share a code: one more code (TIGER), or other codes by "
        "Sinkhorn within their prefix, or the nearest code that is free",
    )
    rqvae: RqvaeConfig = RqvaeConfig()
