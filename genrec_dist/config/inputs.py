"""Sections of what items are: catalog, text embeddings, graph."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from genrec_dist.config.section import Section


class SyntheticConfig(Section):
    """Embedded synthetic catalog in the raw Amazon-2014 format (see catalog/synth.py)."""

    num_items: int = Field(1200, ge=50)
    num_users: int = Field(3000, ge=50)
    seed: int = 0


class CatalogConfig(Section):
    """Raw interactions and metadata -> items, sequences, statistics, ledger."""

    source: Literal["parquet", "amazon2014", "amazon2018", "amazon2023", "synthetic"] = "parquet"
    path: str | None = Field(
        None,
        description="folder of the data set; a relative path is looked for in $GENREC_DATA, ./data and ../shared/data",
    )
    interactions: str | None = Field(None, description="file or glob inside `path`; default by source")
    items: str | None = Field(None, description="metadata file or glob inside `path`; default by source")
    synthetic: SyntheticConfig = SyntheticConfig()
    order: Literal["time", "file"] = "time"
    min_user_interactions: int = Field(5, ge=0, description="iterative k-core; 0 or 1 keeps all")
    min_item_interactions: int = Field(5, ge=0)
    duplicates: Literal["first", "keep"] = "first"
    unknown_items: Literal["keep", "drop"] = "keep"
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    allow_truncated: bool = Field(False, description="go on with what a cut-off .gz file still holds")

    @model_validator(mode="after")
    def _path_or_synthetic(self) -> CatalogConfig:
        if self.source != "synthetic" and self.path is None:
            raise ValueError("catalog.path is needed for every source but 'synthetic'")
        return self


class SemanticConfig(Section):
    """Item text -> embeddings."""

    engine: Literal["sentence_transformers", "transformers", "vllm", "precomputed"] = Field(
        "sentence_transformers", description="precomputed: `model` names a .npy, .parquet or .safetensors file"
    )
    model: str = Field(
        "minilm",
        description="llama2-7b, sentence-t5, bert or minilm, a local folder or a hub id",
    )
    revision: str | None = Field(None, description="commit, branch or tag of a hub id; default: that of the name")
    pooling: Literal["auto", "mean", "last", "cls"] = Field(
        "auto", description="of the last hidden states; auto: what the model's name or its own modules say, else mean"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the model")
    store_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the stored vectors")
    template: str = Field(
        "title: {title}; brand: {brand}; categories: {categories}; description: {description}",
        description="fields separated by '; ', a segment whose field is missing is left out",
    )
    max_tokens: int = Field(128, ge=4)
    normalize: bool = True
    rows_per_shard: int = Field(0, ge=0, description="unit of writing and resuming; 0: from width and store_dtype")
    max_failed_fraction: float = Field(0.0, ge=0, le=1)


class GraphConfig(Section):
    """User-item graph and how it is shared out; the partition decides where work is done, not what comes out."""

    partitioner: Literal["metis", "pymetis", "random"] = Field(
        "pymetis", description="pymetis: METIS with a seed; metis: DGL's, balanced by node type, never the same twice"
    )
    seed: int = Field(0, ge=0, description="of pymetis and random")
    block_nodes: int = Field(
        8192, ge=0, description="nodes that are put together in memory with their neighbours; 0: by number"
    )
    dgl_format: bool = Field(True, description="store the partitions in DGL's format as well, where DGL works")
