"""Sections of embeddings that are trained from interactions: LightGCN, and the fusion with text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from genrec_dist.config.section import OptimConfig, Section, check_heads


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
        check_heads("fusion", self.dim, self.num_heads)
        if self.attention == "mlp" and self.loss == "full_softmax":
            raise ValueError(
                "fusion.attention 'mlp' scores every candidate with its own MLP: use loss 'sampled_softmax'"
            )
        return self
