"""The studies by name, as data: which runs each one makes, and which page it becomes."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from genrec_dist.errors import ConfigError
from genrec_dist.studies import paper
from genrec_dist.studies.csj_maps import csj_maps
from genrec_dist.studies.csj_tables import csj_lambda, csj_main, csj_unique
from genrec_dist.studies.prorec_figures import clusters, csj_tokenizers, tokenizers
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
        stops: after the identifiers, without a generator: 'never', 'optional' (some numbers need one), or 'always'.
    """

    title: str
    family: str
    variants: tuple[Variant, ...]
    page: Callable[[StudyData], StudyPage]
    stops: Literal["never", "optional", "always"] = "never"


CSJ_ID = Variant("csj_id", "CSJ-ID", ("method=csj_id",))
SEMANTIC_ONLY = Variant("semantic_only", "Semantic-only", ("method=semantic_id",))
TOKENIZERS = {"hierarchical_kmeans": "hierarchical k-means", "rqvae": "RQ-VAE", "random": "random"}


def _tokenizers(method: str) -> tuple[Variant, ...]:
    return tuple(
        Variant(name, label, (f"method={method}", f"identifiers.tokenizer={name}"))
        for name, label in TOKENIZERS.items()
    )


STUDIES = {
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
