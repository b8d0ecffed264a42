"""What sections of the configuration share: refusal of unknown keys, optimisers, starts of layers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, validate_assignment=True)


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


def check_heads(section: str, dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"{section}.dim {dim} must be a multiple of num_heads {num_heads}")
