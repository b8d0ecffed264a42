"""The whole configuration as pydantic models; YAML files only fill them.

Every section but `runtime`, `report`, `tracking`, `name` and `references` decides what an artifact contains and
therefore enters its content hash. `runtime` says where and how fast the work is done, never what comes out.
Unknown keys are refused with the nearest known name.
"""

from genrec_dist.config.embeddings import FusionConfig, LightgcnConfig, LightgcnOptim
from genrec_dist.config.identifiers import IdentifierConfig, RqvaeConfig, RqvaeOptim
from genrec_dist.config.inputs import CatalogConfig, GraphConfig, SemanticConfig, SyntheticConfig
from genrec_dist.config.models import GeneratorConfig, GptConfig, HstuConfig, SasrecConfig
from genrec_dist.config.names import NAME_PATTERN, check_name
from genrec_dist.config.reading import (
    build_config,
    dump_config,
    known_keys,
    load_config,
    merge_setting,
    nearest_key,
    parse_override,
)
from genrec_dist.config.run import (
    GENERATIVE,
    WITHOUT_EVALUATION,
    Config,
    EvaluationConfig,
    Reference,
    ReportConfig,
    TrackingConfig,
)
from genrec_dist.config.runtime import DeepspeedConfig, RuntimeConfig, VllmConfig
from genrec_dist.config.section import OptimConfig

__all__ = [
    "GENERATIVE",
    "NAME_PATTERN",
    "WITHOUT_EVALUATION",
    "CatalogConfig",
    "Config",
    "DeepspeedConfig",
    "EvaluationConfig",
    "FusionConfig",
    "GeneratorConfig",
    "GptConfig",
    "GraphConfig",
    "HstuConfig",
    "IdentifierConfig",
    "LightgcnConfig",
    "LightgcnOptim",
    "OptimConfig",
    "Reference",
    "ReportConfig",
    "RqvaeConfig",
    "RqvaeOptim",
    "RuntimeConfig",
    "SasrecConfig",
    "SemanticConfig",
    "SyntheticConfig",
    "TrackingConfig",
    "VllmConfig",
    "build_config",
    "check_name",
    "dump_config",
    "known_keys",
    "load_config",
    "merge_setting",
    "nearest_key",
    "parse_override",
]
