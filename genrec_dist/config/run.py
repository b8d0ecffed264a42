"""The whole configuration of a run, and the sections of how it is judged and shown."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from genrec_dist.config.embeddings import FusionConfig, LightgcnConfig
from genrec_dist.config.identifiers import IdentifierConfig
from genrec_dist.config.inputs import CatalogConfig, GraphConfig, SemanticConfig
from genrec_dist.config.models import GeneratorConfig, GptConfig, HstuConfig, SasrecConfig
from genrec_dist.config.names import NAME_PATTERN
from genrec_dist.config.runtime import RuntimeConfig
from genrec_dist.config.section import Section


class EvaluationConfig(Section):
    """Full-ranking leave-one-out evaluation."""

    cutoffs: list[int] = [1, 5, 10, 20]
    beam_width: int = Field(50, ge=1)
    mix_weight: float = Field(
        0.0, ge=0, description="weight of the distillation token's dense logit beside the beam's log-probability"
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


Reference = Literal["popularity", "sasrec_inner", "sasrec_cosine", "hstu", "stage_one"]
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

    @model_validator(mode="after")
    def _stage_one(self) -> Config:
        if "stage_one" in self.references and (self.method != "prorec" or self.runtime.shard_tables):
            raise ValueError("references: stage_one is the model of method prorec, not with runtime.shard_tables")
        return self

    @model_validator(mode="after")
    def _teacher(self) -> Config:
        if self.method != "prorec" or not self.generator.teacher_weight:
            return self
        if self.fusion.mode == "semantic" or self.runtime.shard_tables:
            raise ValueError("generator.teacher_weight needs Stage I's model: not fusion.mode=semantic or shard_tables")
        if self.generator.max_history > self.fusion.max_history:
            raise ValueError(
                f"generator.teacher_weight: Stage I reads histories of {self.fusion.max_history} items "
                f"(fusion.max_history), generator.max_history is {self.generator.max_history}"
            )
        return self

    @property
    def active_references(self) -> list[Reference]:
        """References of the run; none beside a method that recommends nothing, Stage I only where it has a model."""
        if self.method in WITHOUT_EVALUATION:
            return []
        return [name for name in self.references if name != "stage_one" or self.fusion.mode != "semantic"]

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not NAME_PATTERN.match(value):
            raise ValueError("letters, digits, '.', '_', '-' only, starting with a letter or digit")
        return value
