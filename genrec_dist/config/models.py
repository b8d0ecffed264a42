"""Sections of the sequence models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from genrec_dist.config.section import INIT_OF_LAYERS, Init, OptimConfig, Section, check_heads

LOWEST_RATE = 0.001


class GeneratorConfig(Section):
    """PRORec Stage II: encoder-decoder over item codes."""

    dim: int = Field(128, ge=8)
    num_heads: int = Field(4, ge=1)
    num_encoder_layers: int = Field(1, ge=1)
    num_decoder_layers: int = Field(4, ge=1)
    ffn_multiplier: int = Field(4, ge=1)
    dropout: float = Field(0.3, ge=0, lt=1)
    max_history: int = Field(20, ge=1)
    item_dropout: float = Field(0.0, ge=0, lt=1, description="share of a history's items that training hides")
    time_bumps: int = Field(
        0,
        ge=0,
        description="width of the code of a history item's time, read beside the item; 0: times are not read",
    )
    encoder_input: Literal["item", "codes"] = Field(
        "item", description="one Stage I embedding an item, or its code sequence"
    )
    head: Literal["per_level", "child"] = Field(
        "child", description="per_level: K logits a level (paper); child: softmax over a node's children"
    )
    head_similarity: Literal["dot", "cosine"] = "cosine"
    head_temperature: float = Field(0.07, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    level_decay: float = Field(
        1.0,
        gt=0,
        description="what the loss of a code counts for, over that of the code before it; 1: all alike (paper)",
    )
    distill_weight: float = Field(1.0, ge=0, description="beta of equation 8; 0 removes the token")
    distill_position: Literal["end", "start"] = Field(
        "end", description="end: after the codes (paper); start: before them, so it sees only the user"
    )
    distill_negatives: int = Field(
        0, ge=0, description="random negatives of equation 7, logQ-corrected; 0: the whole catalog"
    )
    distill_similarity: Literal["dot", "cosine"] = "cosine"
    distill_temperature: float = Field(0.07, gt=0)
    item_embedding_rate: float = Field(
        1.0,
        ge=0,
        description="learning rate of the Stage I table that feeds the encoder, over that of the other weights; 0: it "
        "stays as it is",
    )
    node_embedding_rate: float = Field(
        1.0, ge=0, description="the same of the node embeddings that the Stage I table starts (head child)"
    )
    teacher_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share that Stage I's probabilities of all items have in the labels of codes and token, beside the "
        "true item; 0: none",
    )
    teacher_temperature: float = Field(1.0, gt=0, description="divides Stage I's logits")
    teacher_skips_history: bool = Field(
        False,
        description="leave items of the history out of Stage I's probabilities, for data where no user takes an item "
        "twice",
    )
    depth_buckets: bool = Field(
        False,
        description="with optim.length_buckets and head child: batches of targets of like code length first, and of "
        "like histories among them; the decoder is cut to the longest code of a batch",
    )
    init: Init = Field("plain", description=INIT_OF_LAYERS)
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _check(self) -> GeneratorConfig:
        check_heads("generator", self.dim, self.num_heads)
        for name in ("item_embedding_rate", "node_embedding_rate"):
            if 0 < getattr(self, name) < LOWEST_RATE:  # Adam's epsilon would hold such a table back further
                raise ValueError(f"generator.{name} must be 0 or at least {LOWEST_RATE}")
        if self.depth_buckets and not self.optim.length_buckets:
            raise ValueError("generator.depth_buckets needs windows of batches: generator.optim.length_buckets above 0")
        if self.depth_buckets and self.head != "child":  # a level's own head would get no gradient from many batches
            raise ValueError("generator.depth_buckets needs generator.head=child")
        return self


class GptConfig(Section):
    """CSJ-ID generator: decoder-only over the codes of the history."""

    dim: int = Field(256, ge=8)
    num_heads: int = Field(8, ge=1)
    num_layers: int = Field(4, ge=1)
    ffn_multiplier: int = Field(4, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    max_history: int = Field(20, ge=1, description="items of the history")
    head: Literal["per_level", "child"] = Field(
        "per_level", description="per_level: K logits a level (paper); child: softmax over a node's children"
    )
    head_similarity: Literal["dot", "cosine"] = "cosine"
    head_temperature: float = Field(0.07, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    init: Init = Field("plain", description=INIT_OF_LAYERS)
    optim: OptimConfig = OptimConfig(epochs=60, patience=6)

    @model_validator(mode="after")
    def _check(self) -> GptConfig:
        check_heads("gpt", self.dim, self.num_heads)
        return self


class SasrecConfig(Section):
    """SASRec reference with full-catalog cross-entropy."""

    dim: int = Field(128, ge=4)
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(1, ge=1)
    input_norm: bool = Field(False, description="layer norm of item + position")
    dropout: float = Field(0.4, ge=0, lt=1)
    max_history: int = Field(20, ge=1)
    similarity: Literal["inner", "cosine"] = "cosine"
    temperature: float = Field(0.07, gt=0)
    init: Init = Field("plain", description=INIT_OF_LAYERS)
    optim: OptimConfig = OptimConfig()


class HstuConfig(Section):
    """HSTU with full-catalog cross-entropy (Zhai et al. 2024)."""

    dim: int = Field(128, ge=4)
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(2, ge=1)
    dropout: float = Field(0.4, ge=0, lt=1)
    max_history: int = Field(20, ge=1)
    position_buckets: int = Field(32, ge=1, description="distances of two places that are told apart")
    time_buckets: int = Field(64, ge=1, description="of the logarithm of the seconds between two items")
    query_time: Literal["item", "target"] = Field(
        "item",
        description="moment that a place looks back from: its own item's, or the next item's, that of the request, as "
        "in the authors' code; the other models do not know that",
    )
    similarity: Literal["inner", "cosine"] = "cosine"
    temperature: float = Field(0.07, gt=0)
    init_std: float = Field(0.02, gt=0, description="of item table, biases and input projections")
    init: Init = Field("plain", description=INIT_OF_LAYERS)
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _check(self) -> HstuConfig:
        check_heads("hstu", self.dim, self.num_heads)
        return self
