"""Identifier stage: item embeddings -> codebook.safetensors (codes, trie) and quality.json.

A tokenizer reads one table (PRORec's integrated embeddings, or text) or two (CSJ-ID: text and LightGCN). With the
RQ-VAE the artifact also holds its quantised vectors (Zarr, the artifact itself), latent/ (Zarr), model.safetensors,
curves.jsonl, rqvae.json (losses); the others leave the table that they coded when it is made of two.
"""

from __future__ import annotations

import numpy as np

from genrec_dist.artifacts.files import write_json
from genrec_dist.config import Config, IdentifierConfig
from genrec_dist.pipeline import Stage, StageContext

KMEANS_KEYS = ("tokenizer", "num_clusters", "balanced", "iterations", "num_starts")
RANDOM_KEYS = ("tokenizer", "num_clusters", "num_levels")


def identifier_stage(config: Config, inputs: dict[str, Stage]) -> Stage:
    """Stage that turns embedding tables into item codes.

    Args:
        config: section `identifiers` and the seed.
        inputs: one or two stages whose artifacts are embedding tables; the first of two has weight lambda.
    """
    section = config.identifiers
    whole = section.model_dump(mode="json")
    if section.tokenizer == "rqvae":
        kept = {k: v for k, v in whole.items() if k not in ("balanced", "iterations", "num_starts")}
        settings = {"identifiers": kept, "seed": config.seed}
        return Stage("identifiers", 2, settings, inputs, lambda context: _build_rqvae(context, settings))
    keys = KMEANS_KEYS if section.tokenizer == "hierarchical_kmeans" else RANDOM_KEYS
    settings = {k: whole[k] for k in keys} | {"seed": config.seed}
    if len(inputs) > 1:
        settings["semantic_weight"] = section.rqvae.semantic_weight
    return Stage("identifiers", 1, settings, inputs, lambda context: _build_plain(context, settings))


def _build_plain(context: StageContext, settings: dict) -> None:
    """Codes without training: hierarchical k-means, or random."""
    import torch

    from genrec_dist.artifacts.embeddings import write_embeddings
    from genrec_dist.identifiers.hierarchical import hierarchical_codes
    from genrec_dist.identifiers.random_codes import random_codes
    from genrec_dist.identifiers.tables import Tables

    tables = Tables(context.inputs, torch.device("cpu"), resident_bytes=0)
    embeddings = tables.joint(settings.get("semantic_weight", 1.0))
    if settings["tokenizer"] == "random":
        codes = random_codes(len(embeddings), settings["num_clusters"], settings["num_levels"], settings["seed"])
        depth = np.full(len(codes), codes.shape[1], np.int32)
    else:
        codes, depth = hierarchical_codes(
            embeddings,
            settings["num_clusters"],
            seed=settings["seed"],
            balanced=settings["balanced"],
            iterations=settings["iterations"],
            num_starts=settings["num_starts"],
            on_split=lambda done: context.progress(done, len(embeddings), "items"),
        )
    if len(tables.stores) > 1:
        write_embeddings(context.out, embeddings)
    _finish(context, codes, depth, settings["num_clusters"], embeddings, {})


def _build_rqvae(context: StageContext, settings: dict) -> None:
    """Train, code every item, resolve collisions."""
    import torch
    from safetensors.torch import load_file

    from genrec_dist.artifacts.embeddings import write_embeddings
    from genrec_dist.artifacts.reader import EmbeddingStore
    from genrec_dist.identifiers.collisions import quantised, resolve_collisions
    from genrec_dist.identifiers.rqvae_training import CODES, LATENT, train_rqvae
    from genrec_dist.identifiers.tables import Tables
    from genrec_dist.training.launch import launch

    launch(train_rqvae, context, settings)
    config = IdentifierConfig.model_validate(settings["identifiers"])
    codebooks = load_file(context.out / "model.safetensors")["quantizer.codebooks"].numpy()
    nearest = np.load(context.scratch / CODES, allow_pickle=False)
    latent = EmbeddingStore(context.out / LATENT)
    resolved = resolve_collisions(nearest, codebooks, latent.rows, config.collisions)
    write_embeddings(context.out, quantised(resolved.codes, codebooks))
    depth = np.full(len(nearest), resolved.codes.shape[1], np.int32)
    tables = Tables(context.inputs, torch.device("cpu"), resident_bytes=0)
    _finish(
        context,
        resolved.codes,
        depth,
        config.num_clusters,
        tables.joint(config.rqvae.semantic_weight),
        {
            "before_collisions": resolved.report["before"],
            "collision_handling": {k: v for k, v in resolved.report.items() if k != "before"}
            | {"after": resolved.report["after"]["coverage"]},
        },
    )


def _finish(
    context: StageContext, codes: np.ndarray, depth: np.ndarray, num_clusters: int, embeddings: np.ndarray, more: dict
) -> None:
    from genrec_dist.identifiers.quality import codebook_quality
    from genrec_dist.identifiers.trie import build_trie

    build_trie(codes, depth).save(context.out)
    write_json(context.out / "quality.json", codebook_quality(codes, depth, num_clusters, embeddings) | more)
