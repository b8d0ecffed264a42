"""Trained parameters of a model: counted, and from model.safetensors into a model. Knows nothing of training."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file
from torch import nn

from genrec_dist.errors import ArtifactError
from genrec_dist.generator.heads import PerLevelHead
from genrec_dist.generator.transformer import Layer

MODEL = "model.safetensors"
Model = TypeVar("Model", bound=nn.Module)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Number of trained parameters by convention.

    Returns:
        total: all that get gradients.
        non_embedding: without the tables of items, codes, nodes and positions and without the output heads over codes.
            What projects to and from a table's width stays.
        layers: those of the stacked layers alone.
    """

    def trained(*modules: nn.Module) -> int:
        distinct = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        return sum(p.numel() for p in distinct.values())

    total = trained(model)
    tables = trained(*(m for m in model.modules() if isinstance(m, nn.Embedding | PerLevelHead)))
    layers = trained(*(m for m in model.modules() if isinstance(m, Layer)))
    return {"total": total, "non_embedding": total - tables, "layers": layers}


def load_parameters(model: Model, generator: Path, section: str) -> Model:
    """Trained parameters into a model of the same settings, in eval mode; frozen ones need not be stored.

    Args:
        model: with fresh weights.
        generator: artifact that holds model.safetensors.
        section: configuration section that made the model.

    Raises:
        ArtifactError: other names or shapes.
    """
    file = generator / MODEL
    stored = load_file(file)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [name for name, tensor in stored.items() if name in shapes and tensor.shape != shapes[name]]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    missing, unexpected = sorted(shapes.keys() - stored.keys() - frozen), sorted(stored.keys() - shapes.keys())
    if missing or unexpected or wrong:
        raise ArtifactError(
            "stored parameters do not fit the model",
            where=file,
            got=f"missing {missing[:3]}, unexpected {unexpected[:3]}, of other shapes {wrong[:3]}",
            expected=f"the parameters of the run's {section} section",
            fix="build the artifact again",
        )
    model.load_state_dict(stored, strict=False)
    return model.eval()
