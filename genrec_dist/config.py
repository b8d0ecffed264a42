"""The whole configuration as pydantic models; YAML files only fill them.

Every section but `runtime`, `report`, `tracking`, `name` and `references` decides what an artifact contains and
therefore enters its content hash. `runtime` says where and how fast the work is done, never what comes out.
Unknown keys are refused with the nearest known name.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from genrec_dist.errors import ConfigError
from genrec_dist.safe_yaml import parse_yaml, read_yaml

NAME_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")


def check_name(name: str, where: str = "name") -> str:
    """Return `name` if it is safe as one path component.

    Raises:
        ConfigError: anything but letters, digits, '.', '_' and '-', or a leading dot.
    """
    if not NAME_PATTERN.match(name):
        raise ConfigError(
            "not a valid name",
            where=where,
            got=repr(name),
            expected="letters, digits, '.', '_', '-', starting with a letter or digit, at most 100",
            fix="choose a plain name; it becomes a folder",
        )
    return name


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, validate_assignment=True)


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


class OptimConfig(Section):
    """Optimiser, schedule and stopping, shared by every gradient loop."""

    optimizer: Literal["adam", "adamw"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(200, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: float = Field(1.0, ge=0, description="0 disables clipping")
    batch_size: int = Field(256, ge=1, description="global batch, over all workers")
    epochs: int = Field(20, ge=1)
    evaluate_every: int = Field(1, ge=1, description="epochs between validations")
    patience: int = Field(3, ge=1, description="validations without a better NDCG@10 before stopping")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="of products, by autocast over float32 parameters; auto: bf16 on a GPU, else fp32; fp16 scales "
        "its loss",
    )
    length_buckets: int = Field(
        0, ge=0, description="batches per window sorted by history length; 0 keeps the plain shuffle"
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="validate and keep a moving average of the weights with this decay; 0: none"
    )


Init = Literal["plain", "depth_scaled"]
INIT_OF_LAYERS = "start of the layers; depth_scaled: outputs of residual branches over the root of their number (GPT-2)"


def _check_heads(section: str, dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"{section}.dim {dim} must be a multiple of num_heads {num_heads}")


class FusionConfig(Section):
    """PRORec Stage I: sequence backbone, modality adaption layer, alignment."""

    mode: Literal["joint", "concat_pca", "semantic", "collaborative"] = Field(
        "joint",
        description="the arms of PRORec Table 5. concat_pca: the naive concatenation; semantic: text alone, nothing is "
        "trained here; collaborative: E_C of a model that never sees the text",
    )
    semantic_pca: bool = Field(
        True, description="mode semantic: reduce E_S to `dim` by PCA first, as concat_pca does; False: E_S as it is"
    )
    backbone: Literal["din", "sasrec"] = "din"
    dim: int = Field(128, ge=4)
    num_layers: int = Field(2, ge=1, description="self-attention layers (backbone sasrec)")
    num_heads: int = Field(1, ge=1)
    input_norm: bool = Field(False, description="layer norm of item + position (backbone sasrec)")
    max_history: int = Field(20, ge=1)
    dropout: float = Field(0.4, ge=0, lt=1)
    attention: Literal["dot", "mlp"] = Field(
        "dot", description="activation unit of DIN: bilinear, or the MLP of the DIN paper"
    )
    item_dropout: float = Field(0.0, ge=0, lt=1, description="share of a history's items that training hides")
    time_bumps: int = Field(
        0,
        ge=0,
        description="width of the code of a history item's time, read beside the item; 0: times are not read",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the next-item softmax (full_softmax)")
    item_input: Literal["sum", "collaborative"] = Field(
        "sum", description="what the sequence model reads: E_C + E_T, or E_C alone"
    )
    loss: Literal["full_softmax", "sampled_softmax"] = "full_softmax"
    num_negatives: int = Field(512, ge=1, description="uniform negatives shared by a batch (sampled)")
    similarity: Literal["dot", "cosine"] = "cosine"
    temperature: float = Field(0.07, gt=0, description="of the next-item softmax, cosine only")
    align_weight: float = Field(1.0, ge=0, description="alpha of equation 5")
    align_temperature: float = Field(0.07, gt=0, description="tau of equation 3")
    align_similarity: Literal["dot", "cosine"] = "cosine"
    align_positive_in_denominator: bool = Field(
        True, description="False: equation 3 to the letter (j != i in the denominator)"
    )
    integrated: Literal["concat", "sum", "collaborative"] = "concat"
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _check(self) -> FusionConfig:
        _check_heads("fusion", self.dim, self.num_heads)
        if self.attention == "mlp" and self.loss == "full_softmax":
            raise ValueError(
                "fusion.attention 'mlp' scores every candidate with its own MLP: use loss 'sampled_softmax'"
            )
        return self


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


class LightgcnOptim(OptimConfig):
    """As OptimConfig, with what fits tables: Adam in float32, no warm-up, no clipping, many epochs."""

    optimizer: Literal["adam"] = "adam"
    weight_decay: float = Field(0.0, ge=0, le=0, description="always 0: lightgcn.l2 regularises")
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float = Field(0.0, ge=0, description="0 disables clipping")
    batch_size: int = Field(2048, ge=1, description="pairs of a batch, over all workers")
    epochs: int = Field(100, ge=1)
    evaluate_every: int = Field(5, ge=1, description="epochs between validations")
    patience: int = Field(5, ge=1, description="validations without a better NDCG@10 before stopping")
    precision: Literal["fp32"] = "fp32"
    length_buckets: int = Field(0, ge=0, le=0, description="always 0: pairs have no length")
    ema_decay: float = Field(0.0, ge=0, le=0, description="always 0: tables sharded by owner have no average")


class LightgcnConfig(Section):
    """LightGCN: collaborative embeddings of users and items from the interaction graph."""

    dim: int = Field(64, ge=1)
    num_layers: int = Field(3, ge=0)
    init_std: float = Field(0.1, gt=0)
    loss: Literal["bpr", "sampled_softmax"] = "bpr"
    num_negatives: int = Field(1, ge=1, description="a pair (bpr), or shared by a batch (sampled_softmax)")
    negatives: Literal["uniform", "popularity"] = "uniform"
    popularity_exponent: float = Field(0.75, ge=0, le=4, description="popularity: drawn by degree to this power")
    temperature: float = Field(0.2, gt=0, description="of the sampled softmax over cosines")
    similarity: Literal["dot", "cosine"] = Field("dot", description="cosine: sampled_softmax only")
    l2: float = Field(1e-4, ge=0, description="on the layer-0 rows of a batch, half the sum of squares over its pairs")
    mode: Literal["full", "sampled"] = Field(
        "full", description="full: propagate over the whole graph; sampled: over sampled neighbours"
    )
    fanouts: list[int] = Field([], description="most neighbours a node, from the batch outward (sampled)")
    validation_users: int = Field(0, ge=0, description="users of the validation during training; 0: all")
    optim: LightgcnOptim = LightgcnOptim()

    @model_validator(mode="after")
    def _check(self) -> LightgcnConfig:
        if self.mode == "sampled" and (len(self.fanouts) != self.num_layers or min(self.fanouts, default=1) < 1):
            raise ValueError(f"lightgcn.fanouts needs {self.num_layers} numbers above 0, one a layer")
        if self.mode == "full" and self.fanouts:
            raise ValueError("lightgcn.fanouts is for mode 'sampled'")
        if self.similarity == "cosine" and self.loss == "bpr":
            raise ValueError("lightgcn.similarity 'cosine' is for loss 'sampled_softmax'")
        return self


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
    distill_weight: float = Field(1.0, ge=0, description="beta of equation 8; 0 removes the token")
    distill_position: Literal["end", "start"] = Field(
        "end", description="end: after the codes (paper); start: before them, so it sees only the user"
    )
    distill_negatives: int = Field(
        0, ge=0, description="random negatives of equation 7, logQ-corrected; 0: the whole catalog"
    )
    distill_similarity: Literal["dot", "cosine"] = "cosine"
    distill_temperature: float = Field(0.07, gt=0)
    train_item_embeddings: bool = Field(True, description="fine-tune the Stage I table that feeds the encoder")
    train_node_embeddings: bool = Field(
        True, description="fine-tune the node embeddings that the Stage I table starts (head child)"
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
        _check_heads("generator", self.dim, self.num_heads)
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
        _check_heads("gpt", self.dim, self.num_heads)
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
        _check_heads("hstu", self.dim, self.num_heads)
        return self


class EvaluationConfig(Section):
    """Full-ranking leave-one-out evaluation."""

    cutoffs: list[int] = [1, 5, 10, 20]
    beam_width: int = Field(50, ge=1)
    mix_weight: float = Field(
        0.0, ge=0, description="weight of the distillation token's dense log-probability beside the beam's"
    )
    bootstrap_samples: int = Field(1000, ge=0)
    exact_users: int = Field(1000, ge=0, description="users scored over the whole catalog to check the beam; 0 skips")
    validation_users: int = Field(0, ge=0, description="users of the validation during training; 0: all")
    validation_beam: int = Field(20, ge=1)

    @field_validator("cutoffs")
    @classmethod
    def _sorted(cls, value: list[int]) -> list[int]:
        if not value or min(value) < 1:
            raise ValueError("cutoffs must be positive integers")
        return sorted(set(value))

    @model_validator(mode="after")
    def _beam(self) -> EvaluationConfig:
        if self.beam_width < max(self.cutoffs):
            raise ValueError(f"evaluation.beam_width {self.beam_width} is below the largest cutoff {max(self.cutoffs)}")
        return self


Reference = Literal["popularity", "sasrec_inner", "sasrec_cosine", "hstu"]
GENERATIVE = ("prorec", "csj_id", "semantic_id")
"""Methods that generate codes."""
WITHOUT_EVALUATION = {"embed"}
"""Methods that recommend nothing."""


class ReportConfig(Section):
    """What the HTML report adds; nothing here changes a result."""

    tsne_items: int = Field(3000, ge=0, description="items in the t-SNE figure; 0 leaves it out")
    paper_table: Literal["beauty", "sports", "toys"] | None = Field(
        None, description="data set of PRORec Table 3: beauty, sports or toys"
    )


class TrackingConfig(Section):
    """Where the curves of a run's trainings go besides its own files; nothing here changes a result."""

    tensorboard: bool = Field(True, description="event files in the run folder")
    mlflow: str | None = Field(None, description="tracking URI of MLflow: file:PATH or http(s)://HOST")
    wandb: str | None = Field(None, description="project of Weights & Biases")
    offline: bool = Field(False, description="W&B: write to the run folder only, for `wandb sync` later")


class VllmConfig(Section):
    """How vLLM engines run."""

    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of one engine, on one node")
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1)
    max_batched_tokens: int = Field(0, ge=0, description="tokens of a step; 0: 16384 on a GPU, 4096 on a CPU")
    enforce_eager: bool = Field(True, description="False compiles the model and captures CUDA graphs at the start")
    kv_cache_mib: int = Field(0, ge=0, description="key-value cache on a CPU; 0: two full steps")


class DeepspeedConfig(Section):
    """What DeepSpeed's ZeRO may be told beyond its stage; sizes in numbers, not bytes."""

    overlap_comm: bool = Field(True, description="reduce gradients while the backward pass goes on")
    contiguous_gradients: bool = Field(True, description="copy gradients into one buffer as they are made")
    reduce_bucket_size: int = Field(50_000_000, ge=1, description="gradients that are reduced at once")
    allgather_bucket_size: int = Field(50_000_000, ge=1, description="parameters gathered at once (stage 1, 2)")
    prefetch_bucket_size: int = Field(50_000_000, ge=0, description="parameters fetched ahead (stage 3)")
    persistence_threshold: int = Field(100_000, ge=0, description="smaller parameters stay whole (stage 3)")
    max_live_parameters: int = Field(1_000_000_000, ge=0, description="gathered parameters kept at most (stage 3)")
    communication_dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of reduced gradients")
    gather_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of layers' weights of products as workers exchange them, and of their gradients (stage 3); bf16: "
        "half the traffic, for optim.precision bf16, whose products round them anyway",
    )


class RuntimeConfig(Section):
    """Where and how fast; never part of a content hash."""

    backend: Literal["ray", "local"] = Field("ray", description="local: one plain process, no Ray")
    ray_address: str | None = Field(None, description="None starts a private Ray on this machine")
    num_workers: int = Field(1, ge=1, description="training and evaluation workers")
    min_workers: int = Field(
        0,
        ge=0,
        description="fewest training workers under Ray, for clusters that grow and shrink; 0: always num_workers",
    )
    num_embed_workers: int = Field(1, ge=1, description="engines, each on its own cores or GPUs")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int = Field(0, ge=0, description="CPU threads a worker; 0: cores over workers")
    engine: Literal["auto", "torch", "deepspeed"] = Field(
        "auto", description="auto: deepspeed under Ray, torch in a plain process"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="deepspeed: 1 shards the optimiser's moments, 2 gradients too, 3 parameters too"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="keep moments (zero_stage 1 to 3), or parameters as well (3), in the CPU's memory"
    )
    deepspeed: DeepspeedConfig = DeepspeedConfig()
    micro_batches: int = Field(
        0,
        ge=0,
        description="parts of a global batch over all workers, a multiple of num_workers: each worker adds up the "
        "gradients of its parts; dropout goes by part, so it is the same for any number of workers. 0: one a worker",
    )
    activation_checkpointing: bool = Field(
        False, description="keep the inputs of Transformer layers only and compute the rest again in the backward pass"
    )
    step_mode: Literal["auto", "eager", "graph", "compile"] = Field(
        "auto",
        description="of training on a GPU by the torch engine; graph: CUDA graphs of whole steps; compile: fused by "
        "torch.compile, then graphs; auto: graph",
    )
    checkpoint_minutes: float = Field(
        1.0, ge=0, description="minutes between checkpoints; 0: epochs and checkpoint_steps decide"
    )
    checkpoint_steps: int = Field(0, ge=0, description="steps between checkpoints; 0: the clock and epochs decide")
    keep_checkpoints: int = Field(2, ge=1)
    spmm: Literal["auto", "dgl", "torch", "triton"] = Field(
        "auto", description="sums over neighbours; auto: triton on a GPU, dgl on a CPU where it works, else torch"
    )
    overlap_halo: bool = Field(False, description="sum over owned neighbours while halo rows are on their way")
    partition_minutes: float = Field(60.0, gt=0, description="time limit of the graph partitioner")
    shard_tables: bool = Field(
        False,
        description="Stage I with user sequences and item tables sharded over graph partitions; with fusion.loss "
        "full_softmax every worker still gets the whole table with each batch",
    )
    resident_gib: float = Field(
        4.0, ge=0, description="embedding rows that a k-means worker keeps in memory; more are read again in each pass"
    )
    task_mib: float = Field(
        256.0,
        ge=0,
        description="embedding rows of a k-means subtree that one task takes; larger nodes go to all workers",
    )
    embed_executor: Literal["actors", "ray_data_llm"] = Field(
        "actors", description="actors: an engine in each Ray Data actor; ray_data_llm: Ray's own vLLM processor"
    )
    embed_batch_size: int = Field(0, ge=0, description="most texts of a forward pass; 0: the engine's choice")
    embed_batch_tokens: int = Field(0, ge=0, description="most padded tokens of a forward pass; 0: likewise")
    reuse_embeddings: bool = Field(
        True, description="take the vectors of texts that an earlier artifact of the same model and settings holds"
    )
    vllm: VllmConfig = VllmConfig()
    eval_batch_size: int = Field(256, ge=1)
    max_failures: int = Field(1, ge=0, description="retries after real failures")
    max_preemptions: int = Field(10, ge=0, description="retries after node loss")
    hang_seconds: float = Field(
        600.0, ge=0, description="a worker that is silent for so long after its first step is ended; 0: never"
    )
    grace_seconds: float = Field(25.0, ge=0, description="time to save a checkpoint after SIGTERM")
    progress_seconds: float = Field(15.0, gt=0, description="between plain progress lines")
    mirror_seconds: float = Field(
        60.0, gt=0, description="between copies of the run folder and of unfinished builds to an S3 store"
    )

    @model_validator(mode="after")
    def _parts(self) -> RuntimeConfig:
        if self.micro_batches % self.num_workers:
            raise ValueError(
                f"runtime.micro_batches {self.micro_batches} must be a multiple of num_workers {self.num_workers}"
            )
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"runtime.offload '{self.offload}' needs runtime.zero_stage {least} or more")
        return self


class Config(Section):
    """One run."""

    name: str = "run"
    method: Literal["prorec", "csj_id", "semantic_id", "sasrec", "hstu", "popularity", "embed", "lightgcn"] = "prorec"
    seed: int = Field(0, ge=0)
    catalog: CatalogConfig = CatalogConfig(source="synthetic")
    semantic: SemanticConfig = SemanticConfig()
    graph: GraphConfig = GraphConfig()
    lightgcn: LightgcnConfig = LightgcnConfig()
    fusion: FusionConfig = FusionConfig()
    identifiers: IdentifierConfig = IdentifierConfig()
    generator: GeneratorConfig = GeneratorConfig()
    gpt: GptConfig = GptConfig()
    sasrec: SasrecConfig = SasrecConfig()
    hstu: HstuConfig = HstuConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    references: list[Reference] = ["popularity", "sasrec_cosine"]
    report: ReportConfig = ReportConfig()
    tracking: TrackingConfig = TrackingConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def active_references(self) -> list[Reference]:
        """References of the run; none beside a method that recommends nothing."""
        return [] if self.method in WITHOUT_EVALUATION else self.references

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not NAME_PATTERN.match(value):
            raise ValueError("letters, digits, '.', '_', '-' only, starting with a letter or digit")
        return value


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration, sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        inner = _section_of(field.annotation)
        if inner is not None:
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def nearest_key(key: str) -> str | None:
    """The known dotted key most like `key`, or None."""
    keys = known_keys()
    by_leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in keys], 1, 0.6)
    close = difflib.get_close_matches(key, keys, 1, 0.6)
    if close:
        return close[0]
    if by_leaf:
        return next(k for k in keys if k.rsplit(".", 1)[-1] == by_leaf[0])
    return None


def parse_override(text: str) -> tuple[str, Any]:
    """Split 'a.b=value'; the value is read as YAML.

    Raises:
        ConfigError: no '=' or the value is not YAML.
    """
    key, sep, raw = text.partition("=")
    if not sep or not key.strip():
        raise ConfigError("not a setting", where="--set", got=text, expected="section.key=value")
    try:
        return key.strip(), parse_yaml(raw, f"--set {key}")
    except ConfigError as error:
        raise ConfigError("value is not YAML", where=f"--set {key}", got=raw[:200], fix="quote it") from error


def merge_setting(base: dict, key: str, value: Any) -> None:
    """Set the value of a dotted key in nested mappings, in place.

    Raises:
        ConfigError: a part of the key before the last one is no section.
    """
    parts = key.split(".")
    for part in parts[:-1]:
        nested = base.setdefault(part, {})
        if not isinstance(nested, dict):
            raise ConfigError("not a section", where=key, got=nested, expected="a mapping")
        base = nested
    base[parts[-1]] = value


def build_config(values: dict, overrides: list[str] | None = None, where: str = "config") -> Config:
    """Validate a mapping (plus 'a.b=c' overrides) into a Config.

    Raises:
        ConfigError: unknown key (dotted path and nearest name) or bad value, every one listed.
    """
    values = _copy(values)
    for text in overrides or []:
        merge_setting(values, *parse_override(text))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "(whole)"
            if item["type"] == "extra_forbidden":
                near = nearest_key(key)
                problems.append(f"{key}: unknown key" + (f"; nearest: {near}" if near else ""))
            else:
                problems.append(f"{key}: {item['msg']}; got {item.get('input')!r:.200}")
        raise ConfigError(
            "configuration is not valid",
            where=where,
            got="\n       ".join(problems),
            fix="`genrec config show CONFIG` prints every key with its value",
        ) from None


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return list(value) if isinstance(value, list) else value


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and validate it.

    Raises:
        ConfigError: missing file, not YAML, not a mapping, unknown key or bad value.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError("no such configuration file", where=path, fix="see configs/ for examples")
    values = read_yaml(path)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError("configuration is not a mapping", where=path, got=type(values).__name__)
    values.setdefault("name", path.stem)
    return build_config(values, overrides, where=str(path))


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
