"""The studies by name, as data: which runs each one makes, and which page it becomes."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from genrec_dist.config import Config
from genrec_dist.errors import ConfigError
from genrec_dist.semantic.encoders import missing_weights
from genrec_dist.studies import paper
from genrec_dist.studies.csj_maps import csj_maps
from genrec_dist.studies.csj_tables import csj_lambda, csj_main, csj_unique
from genrec_dist.studies.prorec_figures import clusters, csj_tokenizers, encoders, tokenizers
from genrec_dist.studies.prorec_tables import modalities, performance, similarity, tasks
from genrec_dist.studies.study_data import StudyData, Variant
from genrec_dist.studies.study_page import StudyPage


@dataclass(frozen=True)
class Study:
    """One table or figure of a paper.

    Args:
        title: heading of its page.
        family: default configuration is `configs/<family>_<data set>.yaml`.
        variants: rows of the table.
        page: makes the page of the finished runs.
        stops: at `until`, without a generator: 'never', 'optional' (some numbers need one), or 'always'.
        until: the last stage of a run that stops early.
        obstacle: why a run with this configuration cannot be made on this machine, or None.
    """

    title: str
    family: str
    variants: tuple[Variant, ...]
    page: Callable[[StudyData], StudyPage]
    stops: Literal["never", "optional", "always"] = "never"
    until: str = "identifiers"
    obstacle: Callable[[Config], str | None] = lambda _: None


CSJ_ID = Variant("csj_id", "CSJ-ID", ("method=csj_id",))
SEMANTIC_ONLY = Variant("semantic_only", "Semantic-only", ("method=semantic_id",))
TOKENIZERS = {"hierarchical_kmeans": "hierarchical k-means", "rqvae": "RQ-VAE", "random": "random"}


def _tokenizers(method: str) -> tuple[Variant, ...]:
    return tuple(
        Variant(name, label, (f"method={method}", f"identifiers.tokenizer={name}"))
        for name, label in TOKENIZERS.items()
    )


NO_DISTILLATION = ("generator.distill_weight=0", "generator.teacher_weight=0")
CONCAT = ("method=prorec", "fusion.mode=concat_pca")
JOINT = ("method=prorec", "fusion.mode=joint")
ENCODERS = {"llama2-7b": "Llama2-7b", "sentence-t5": "Sentence-T5", "bert": "BERT", "minilm": "MiniLM"}

STUDIES = {
    "performance": Study(
        "PRORec against references (Table 3)", "prorec", (Variant("prorec", "PRORec", ("method=prorec",)),), performance
    ),
    "similarity": Study(
        "PRORec: similarity of the modalities (Table 4)",
        "prorec",
        (Variant("concat", "Concat", CONCAT), Variant("ours", "PRORec", JOINT)),
        similarity,
        "always",
        "fusion",
    ),
    "modalities": Study(
        "PRORec with one modality, or both concatenated (Table 5)",
        "prorec",
        (
            Variant("semantic", "Semantic only", ("method=prorec", "fusion.mode=semantic", *NO_DISTILLATION)),
            Variant(
                "collaborative", "Collaborative only", ("method=prorec", "fusion.mode=collaborative", *NO_DISTILLATION)
            ),
            Variant("concat", "Concat", (*CONCAT, *NO_DISTILLATION)),
            Variant("ours", "PRORec", JOINT),
        ),
        modalities,
    ),
    "tasks": Study(
        "PRORec without its tasks (Table 6)",
        "prorec",
        (
            Variant("neither", "Neither task", (*CONCAT, *NO_DISTILLATION)),
            Variant("alignment", "Alignment", (*JOINT, *NO_DISTILLATION)),
            Variant("both", "Alignment and distillation", JOINT),
            Variant("distillation", "Distillation alone", CONCAT),
        ),
        tasks,
    ),
    "encoders": Study(
        "PRORec with other text encoders (Figure 7)",
        "prorec",
        tuple(Variant(name, label, ("method=prorec", f"semantic.model={name}")) for name, label in ENCODERS.items()),
        encoders,
        obstacle=lambda config: missing_weights(config.semantic),
    ),
    "csj-main": Study("CSJ-ID against semantic-only codes (4.2)", "csj_id", (CSJ_ID, SEMANTIC_ONLY), csj_main),
    "csj-lambda": Study(
        "CSJ-ID: what λ trades (4.3.1)",
        "csj_id",
        tuple(
            Variant(f"lambda-{x:g}", f"λ = {x:g}", ("method=csj_id", f"identifiers.rqvae.semantic_weight={x:g}"))
            for x in paper.CSJ_LAMBDA
        ),
        csj_lambda,
        "optional",
    ),
    "csj-unique": Study("CSJ-ID: uniqueness of codes (4.3.2)", "csj_id", (CSJ_ID, SEMANTIC_ONLY), csj_unique, "always"),
    "csj-tsne": Study("CSJ-ID: maps of the codes (4.4)", "csj_id", (CSJ_ID, SEMANTIC_ONLY), csj_maps, "always"),
    "csj-tokenizers": Study("CSJ-ID with other tokenizers", "csj_id", _tokenizers("csj_id"), csj_tokenizers),
    "tokenizers": Study("PRORec with other tokenizers (Figure 8)", "prorec", _tokenizers("prorec"), tokenizers),
    "clusters": Study(
        "PRORec: number of clusters (Figure 9)",
        "prorec",
        tuple(
            Variant(f"k{k}", f"K = {k}", ("method=prorec", f"identifiers.num_clusters={k}")) for k in (128, 256, 512)
        ),
        clusters,
    ),
}


def find_study(name: str) -> Study:
    """A study by name.

    Raises:
        ConfigError: there is none; the nearest names are said.
    """
    if name in STUDIES:
        return STUDIES[name]
    near = difflib.get_close_matches(name, STUDIES, 3, 0.4)
    raise ConfigError(
        "no such study",
        where="STUDY",
        got=name,
        expected=f"one of {', '.join(STUDIES)}",
        fix=f"nearest: {', '.join(near)}" if near else "see docs/studies.md",
    )


PAPERS: dict[str, dict[str, str]] = {
    "prorec": {
        "Table 3": "performance",
        "Table 4": "similarity",
        "Table 5": "modalities",
        "Table 6": "tasks",
        "Figure 7": "encoders",
        "Figure 8": "tokenizers",
        "Figure 9": "clusters",
    },
    "csj_id": {
        "Section 4.2": "csj-main",
        "Section 4.3.1": "csj-lambda",
        "Section 4.3.2": "csj-unique",
        "Section 4.4": "csj-tsne",
    },
}
"""Study of each table and figure, by paper. CSJ-ID numbers neither."""
