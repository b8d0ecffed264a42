"""Identifier stage: integrated embeddings -> codebook.safetensors (codes, trie) and quality.json."""

from __future__ import annotations

from genrec_dist.artifacts.files import write_json
from genrec_dist.artifacts.reader import read_embeddings
from genrec_dist.config import Config
from genrec_dist.pipeline import Stage, StageContext


def identifier_stage(config: Config, fusion: Stage) -> Stage:
    """Stage that turns the integrated embeddings of `fusion` into item codes."""
    settings = config.identifiers.model_dump(mode="json") | {"seed": config.seed}
    return Stage("identifiers", 1, settings, {"fusion": fusion}, lambda context: _build(context, settings))


def _build(context: StageContext, settings: dict) -> None:
    from genrec_dist.identifiers.hierarchical import hierarchical_codes
    from genrec_dist.identifiers.quality import codebook_quality
    from genrec_dist.identifiers.trie import build_trie

    embeddings = read_embeddings(context.inputs["fusion"])
    codes, depth = hierarchical_codes(
        embeddings,
        settings["num_clusters"],
        seed=settings["seed"],
        balanced=settings["balanced"],
        iterations=settings["iterations"],
        num_starts=settings["num_starts"],
        on_split=lambda done: context.progress(done, len(embeddings), "items"),
    )
    build_trie(codes, depth).save(context.out)
    write_json(context.out / "quality.json", codebook_quality(codes, depth, settings["num_clusters"], embeddings))
