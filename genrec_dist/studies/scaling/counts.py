"""Parameters of a model that is not built yet, by the conventions of `generator.parameters.count_parameters`.

Follows the formulas of `studies/sizes.py`; the tests count the same on the real modules.
"""

from __future__ import annotations

from genrec_dist.config import Config
from genrec_dist.studies.sizes import CodebookSize, ModelSize, encoder_layer_parameters


def planned_parameters(
    config: Config, section: str, size: ModelSize, codebook: CodebookSize | None = None
) -> dict[str, int]:
    """Number of trained parameters: total, non_embedding, layers.

    Args:
        config: of the run.
        section: of the model.
        size: its groups of parameters.
        codebook: of models over codes.
    """
    groups, settings = size.parameters, getattr(config, section)
    dim, history = settings.dim, settings.max_history
    tables = groups.get("item embeddings", 0) + groups.get("node embeddings", 0)
    if section in ("generator", "gpt"):
        assert codebook is not None
        depth, codes = round(codebook.max_depth), codebook.num_codes
        tables += groups["head"] if settings.head == "per_level" else 0
    if section == "generator":
        reads_codes = settings.encoder_input == "codes" or settings.head == "per_level"
        tables += (history + depth + 2 + reads_codes * depth * codes) * dim
        layers = groups["encoder"] + groups["decoder"] - 2 * 2 * dim  # a norm after each stack
    elif section == "gpt":
        tables += (depth * (codes + 1) + depth + history + 1) * dim
        layers = groups["layers"] - 2 * dim
    elif section == "hstu":
        tables += groups["inputs"]
        layers = groups["layers"] - 2 * dim * (settings.similarity == "inner")
    else:
        tables += history * dim
        layers = settings.num_layers * encoder_layer_parameters(dim, 4)
    return {"total": size.num_parameters, "non_embedding": size.num_parameters - tables, "layers": layers}
