"""Identifier stage: item embeddings -> codebook.safetensors (codes, trie) and quality.json.

A tokenizer reads one table (PRORec's integrated embeddings, or text) or two (CSJ-ID: text and LightGCN). Beside these:

- hierarchical_kmeans: splits.safetensors and centroids.npy (centroids of every split), kmeans.jsonl (course of each
  k-means); the table that was coded (Zarr, the artifact itself) when it is made of two
- residual_kmeans: codebooks.safetensors, kmeans.jsonl, the quantised vectors (Zarr, the artifact itself)
- rqvae: the quantised vectors (Zarr, the artifact itself), latent/ (Zarr), model.safetensors, curves.jsonl, rqvae.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from genrec_dist.artifacts.files import append_jsonl, write_json
from genrec_dist.config import Config, IdentifierConfig
from genrec_dist.identifiers.rows import Rows, RowSource
from genrec_dist.pipeline import Stage, StageContext

KMEANS_KEYS = ("iterations", "tolerance", "num_starts", "start", "metric")
KEYS = {
    "hierarchical_kmeans": ("tokenizer", "num_clusters", "balanced", *KMEANS_KEYS),
    "residual_kmeans": ("tokenizer", "num_clusters", "num_levels", "balanced", "collisions", *KMEANS_KEYS),
    "random": ("tokenizer", "num_clusters", "num_levels"),
}
KMEANS_LOG = "kmeans.jsonl"
CODEBOOKS = "codebooks.safetensors"


def identifier_stage(config: Config, inputs: dict[str, Stage]) -> Stage:
    """Stage that turns embedding tables into item codes.

    Args:
        config: section `identifiers` and the seed.
        inputs: one or two stages whose artifacts are embedding tables; the first of two has weight lambda.
    """
    section = config.identifiers
    whole = section.model_dump(mode="json")
    if section.tokenizer == "rqvae":
        kept = {k: v for k, v in whole.items() if k not in ("balanced", *KMEANS_KEYS)}
        settings = {"identifiers": kept, "seed": config.seed}
        return Stage("identifiers", 3, settings, inputs, lambda context: _build_rqvae(context, settings))
    settings = {k: whole[k] for k in KEYS[section.tokenizer]} | {"seed": config.seed}
    if len(inputs) > 1:
        settings["semantic_weight"] = section.rqvae.semantic_weight
    build = {
        "hierarchical_kmeans": _build_hierarchical,
        "residual_kmeans": _build_residual,
        "random": _build_random,
    }[section.tokenizer]
    return Stage("identifiers", 2, settings, inputs, lambda context: build(context, settings))


def _source(context: StageContext, settings: dict, unit: bool = False) -> RowSource:
    return RowSource(dict(context.inputs), weight=settings.get("semantic_weight", 1.0), unit=unit)


def _options(settings: dict) -> Any:
    from genrec_dist.identifiers.kmeans import KMeansOptions

    return KMeansOptions(**{key: settings[key] for key in ("balanced", *KMEANS_KEYS)})


def _make_crew(context: StageContext, rows: Rows) -> Any:
    """Workers of the cluster for tables that do not fit one task, threads of this process for others."""
    from genrec_dist.cluster import worker_threads
    from genrec_dist.identifiers.crew import LocalCrew
    from genrec_dist.training.worker import pick_device

    runtime = context.runtime
    resident = int(runtime.resident_gib * 2**30)
    if runtime.backend == "ray" and 4 * rows.num_rows * rows.dim > _task_bytes(context):
        from genrec_dist.identifiers.ray_crew import RayCrew

        return RayCrew(context, resident)
    on_gpu = pick_device(runtime.device).type == "cuda" and 4 * rows.num_rows * rows.dim > _task_bytes(context)
    return LocalCrew(worker_threads(runtime), resident, on_gpu)


def _task_bytes(context: StageContext) -> int:
    return int(context.runtime.task_mib * 2**20)


def _log_iteration(context: StageContext, settings: dict, where: str, state: Any) -> None:
    done = len(state.objective)
    context.event(
        "kmeans_iteration",
        node=where,
        iteration=done,
        objective=state.objective[-1],
        imbalance=state.imbalance[-1],
        splits=state.splits[-1],
    )
    context.progress(done, settings["iterations"], "iterations", node=where, objective=state.objective[-1])


def _build_random(context: StageContext, settings: dict) -> None:
    from genrec_dist.identifiers.random_codes import random_codes

    rows = _source(context, settings).open()
    codes = random_codes(rows.num_rows, settings["num_clusters"], settings["num_levels"], settings["seed"])
    _keep_joint_table(context, rows)
    _finish(context, codes, np.full(len(codes), codes.shape[1], np.int32), settings["num_clusters"], rows, {})


def _build_hierarchical(context: StageContext, settings: dict) -> None:
    from genrec_dist.identifiers.hierarchical import TreeOptions, build_tree
    from genrec_dist.identifiers.tree import Splits

    source = _source(context, settings, settings["metric"] == "cosine")
    rows = source.open()
    options = TreeOptions(settings["num_clusters"], settings["seed"], _options(settings), _task_bytes(context))
    crew = _make_crew(context, rows)
    try:
        tree = build_tree(
            source,
            options,
            crew,
            context.scratch,
            on_split=lambda done: context.progress(done, rows.num_rows, "items"),
            on_iteration=lambda path, state: _log_iteration(context, settings, f"node {list(path)}", state),
        )
    finally:
        crew.close()
    Splits.write(context.out, tree.splits, options.num_clusters, settings["metric"], rows.dim)
    _write_log(context.out, [{"path": list(split.path), **split.log} for split in tree.splits])
    plain = _source(context, settings).open()
    _keep_joint_table(context, plain)
    _finish(context, tree.codes, tree.depth, options.num_clusters, plain, {})


def _build_residual(context: StageContext, settings: dict) -> None:
    from safetensors.numpy import save_file

    from genrec_dist.artifacts.embeddings import stream_embeddings
    from genrec_dist.identifiers.collisions import quantised, resolve_collisions
    from genrec_dist.identifiers.residual import residual_kmeans

    source = _source(context, settings, settings["metric"] == "cosine")
    rows = source.open()
    crew = _make_crew(context, rows)
    try:
        found = residual_kmeans(
            source,
            settings["num_levels"],
            settings["num_clusters"],
            seed=settings["seed"],
            options=_options(settings),
            crew=crew,
            scratch=context.scratch,
            on_iteration=lambda level, state: _log_iteration(context, settings, f"level {level + 1}", state),
        )
    finally:
        crew.close()
    save_file({"codebooks": found.codebooks}, context.out / CODEBOOKS, {"metric": settings["metric"]})
    _write_log(context.out, found.logs)
    resolved = resolve_collisions(found.codes, found.codebooks, rows.take, settings["collisions"])
    stream_embeddings(
        context.out,
        rows.num_rows,
        rows.dim,
        lambda start, stop: quantised(resolved.codes[start:stop], found.codebooks),
    )
    depth = np.full(rows.num_rows, resolved.codes.shape[1], np.int32)
    more = _collision_facts(resolved.report)
    _finish(context, resolved.codes, depth, settings["num_clusters"], _source(context, settings).open(), more)


def _keep_joint_table(context: StageContext, rows: Rows) -> None:
    """Write the table that was coded where it is made of two."""
    from genrec_dist.artifacts.embeddings import stream_embeddings

    if len(context.inputs) > 1:
        stream_embeddings(context.out, rows.num_rows, rows.dim, rows.read)


def _write_log(out: Path, lines: list[dict]) -> None:
    (out / KMEANS_LOG).unlink(missing_ok=True)
    for line in lines:
        append_jsonl(out / KMEANS_LOG, line)


def _collision_facts(report: dict) -> dict:
    return {
        "before_collisions": report["before"],
        "collision_handling": {k: v for k, v in report.items() if k != "before"}
        | {"after": report["after"]["coverage"]},
    }


def _build_rqvae(context: StageContext, settings: dict) -> None:
    """Train, code every item, resolve collisions."""
    from safetensors.torch import load_file

    from genrec_dist.artifacts.embeddings import write_embeddings
    from genrec_dist.artifacts.reader import EmbeddingStore
    from genrec_dist.identifiers.collisions import quantised, resolve_collisions
    from genrec_dist.identifiers.rqvae_training import CODES, LATENT, train_rqvae
    from genrec_dist.training.launch import launch

    launch(train_rqvae, context, settings)
    config = IdentifierConfig.model_validate(settings["identifiers"])
    codebooks = load_file(context.out / "model.safetensors")["quantizer.codebooks"].numpy()
    nearest = np.load(context.scratch / CODES, allow_pickle=False)
    latent = EmbeddingStore(context.out / LATENT)
    resolved = resolve_collisions(nearest, codebooks, latent.rows, config.collisions)
    write_embeddings(context.out, quantised(resolved.codes, codebooks))
    depth = np.full(len(nearest), resolved.codes.shape[1], np.int32)
    rows = RowSource(dict(context.inputs), weight=config.rqvae.semantic_weight).open()
    _finish(context, resolved.codes, depth, config.num_clusters, rows, _collision_facts(resolved.report))


def _finish(
    context: StageContext, codes: np.ndarray, depth: np.ndarray, num_clusters: int, rows: Rows, more: dict
) -> None:
    from genrec_dist.identifiers.quality import codebook_quality
    from genrec_dist.identifiers.trie import build_trie

    build_trie(codes, depth).save(context.out)
    write_json(context.out / "quality.json", codebook_quality(codes, depth, num_clusters, rows) | more)
