"""`genrec run --dry-run`: what a run would build, hold and compute. Reads only; makes no file or folder.

Numbers come from finished artifacts where the store has them, else from the input files' metadata or the
settings; every estimate is marked as one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from genrec_dist.artifacts.places import local_folder
from genrec_dist.artifacts.store import ArtifactStore
from genrec_dist.config import Config
from genrec_dist.pipeline import Stage, closure
from genrec_dist.semantic.encoders import model_shape
from genrec_dist.semantic.price import Price, price_embedding
from genrec_dist.studies.memory import training_memory
from genrec_dist.studies.sizes import (
    Batches,
    CodebookSize,
    Counts,
    ModelSize,
    batch_arithmetic,
    expected_codebook,
    fusion_size,
    generator_size,
    gpt_size,
    hstu_size,
    lightgcn_size,
    sasrec_size,
)
from launcher.run import has_unfinished, is_finished, trained_sections

DEFAULT_DIM = 768
LARGE_MODEL = 1_000_000_000
H100_TFLOPS = 480
"""What one H100 was measured to do in this stage, rounded down (docs/results, Llama2-7b in bfloat16)."""


@dataclass
class Loop:
    """One gradient loop of the run: its sizes, batches and memory."""

    name: str
    size: ModelSize
    batches: Batches
    memory: dict[str, float]


@dataclass
class Plan:
    """Everything a dry run prints."""

    stages: list[tuple[str, str, str]]
    counts: Counts | None
    codebook: CodebookSize | None
    loops: list[Loop]
    notes: list[str]
    embedding: Price | None = None


def make_plan(config: Config, stages: list[Stage], store: str | Path, probe: bool | None = None) -> Plan:
    """Work out a run without starting anything.

    Args:
        config: resolved configuration.
        stages: the method's stages.
        store: artifact store, need not exist.
        probe: time layers of the text encoder on this machine; None: where embeddings are all that the run makes.
    """
    ordered = closure(stages, lambda stage: is_finished(stage, store))
    here = ArtifactStore(local_folder(store))  # what is in a bucket alone is not fetched for an estimate
    finished = {s.name: here.path(s.name, s.key) for s in ordered if here.exists(s.name, s.key)}
    rows = [(s.title, _action(s, store), s.key) for s in ordered]
    notes: list[str] = []
    counts = catalog_counts(config, finished.get("catalog"))
    embedding = None
    if any(stage.name == "semantic" and not is_finished(stage, store) for stage in ordered):
        probe = config.method == "embed" if probe is None else probe
        embedding = price_embedding(config, counts.num_items if counts else None, finished.get("catalog"), probe)
        notes += (
            embedding.notes
            if embedding
            else ["embeddings: nothing can be said before the catalog or the model is here"]
        )
    if counts is None:
        notes.append("counts, parameters and costs are known after the catalog stage: raw reviews are not counted here")
        return Plan(rows, None, None, [], notes, embedding)
    if counts.note != "exact":
        notes.append(f"counts: {counts.note}; what follows from them is an estimate too")
    codebook, loops = None, []
    for section in trained_sections(config):
        loop, book = section_loop(config, section, counts, finished, notes)
        codebook = book or codebook
        loops.append(loop)
    return Plan(rows, counts, codebook, loops, notes, embedding)


def section_loop(
    config: Config, section: str, counts: Counts, finished: dict[str, Path], notes: list[str]
) -> tuple[Loop, CodebookSize | None]:
    """Sizes of one gradient loop, and the codebook that they follow from.

    Args:
        config: resolved configuration.
        section: one of `trained_sections`.
        counts: of the catalog.
        finished: artifacts that are there, by stage name.
        notes: get what had to be assumed.
    """
    codebook = None
    if section == "lightgcn":
        size, samples = lightgcn_size(config.lightgcn, counts), counts.num_training_pairs
    elif section == "fusion":
        size, samples = _fusion(config, counts, finished.get("semantic"), notes)
    elif section == "generator":
        codebook = codebook_size(config, counts, finished.get("identifiers"))
        if codebook.note != "exact":
            notes.append(f"codebook: {codebook.note}; k-means that splits unevenly goes deeper")
        width = integrated_width(config, finished.get("semantic"), notes)
        size, samples = generator_size(config.generator, codebook, counts.num_items, width), counts.num_prefixes
    elif section == "gpt":
        codebook = codebook_size(config, counts, finished.get("identifiers"))
        samples = max(counts.num_windows(config.gpt.max_history), 1)
        size = gpt_size(config.gpt, codebook, config.identifiers.rqvae.latent_dim, counts.num_prefixes / samples)
    elif section == "hstu":
        samples = max(counts.num_windows(config.hstu.max_history), 1)
        size = hstu_size(config.hstu, counts.num_items, counts.num_prefixes / samples)
    else:
        samples = max(counts.num_windows(config.sasrec.max_history), 1)
        size = sasrec_size(config.sasrec, counts.num_items, counts.num_prefixes / samples)
    return _loop(config, section, size, samples), codebook


def integrated_width(config: Config, semantic: Path | None, notes: list[str]) -> int:
    """Columns of the integrated embeddings."""
    fusion = config.fusion
    if fusion.mode in ("semantic", "concat_pca"):
        full = _text_width(config, semantic, notes)
        if fusion.mode == "semantic":
            return min(full, fusion.dim) if fusion.semantic_pca else full
        return min(full, fusion.dim) + fusion.dim
    return fusion.dim * (2 if fusion.mode == "joint" and fusion.integrated == "concat" else 1)


def _action(stage: Stage, store: str | Path) -> str:
    if is_finished(stage, store):
        return "reuse"
    return "continue" if has_unfinished(stage, store) else "build"


def _loop(config: Config, name: str, size: ModelSize, samples: int) -> Loop:
    runtime, optim = config.runtime, getattr(config, name).optim
    batches = batch_arithmetic(samples, optim, runtime.num_workers)
    zero = runtime.engine == "deepspeed" or (runtime.engine == "auto" and runtime.backend == "ray")
    sharded = name == "lightgcn" or (name == "fusion" and runtime.shard_tables)
    by_owner = ("node embeddings", "item embeddings", "semantic embeddings") if sharded else ()
    averaged = optim.ema_decay > 0
    memory = training_memory(
        size, batches.per_worker, runtime, zero=zero and not sharded, by_owner=by_owner, averaged=averaged
    )
    return Loop(name, size, batches, memory)


def _fusion(config: Config, counts: Counts, semantic: Path | None, notes: list[str]) -> tuple[ModelSize, int]:
    dim = _text_width(config, semantic, notes)
    settings, samples, mean = config.fusion, counts.num_prefixes, 1.0
    if settings.backbone == "sasrec" and settings.loss == "full_softmax":  # a loss at every position of a row
        samples = max(counts.num_windows(settings.max_history), 1)
        mean = counts.num_prefixes / samples
    return fusion_size(settings, counts.num_items, dim, mean), samples


def _text_width(config: Config, semantic: Path | None, notes: list[str]) -> int:
    """Columns of the text embeddings; a guess is noted once."""
    dim = semantic_dim(config, semantic)
    if dim is not None:
        return dim
    note = f"semantic embeddings: width unknown before the stage has run, {DEFAULT_DIM} assumed"
    notes += [] if note in notes else [note]
    return DEFAULT_DIM


def catalog_counts(config: Config, artifact: Path | None) -> Counts | None:
    """Users, items and interactions: exact from the artifact, else from metadata; None for raw reviews."""
    if artifact is not None:
        from genrec_dist.catalog.dataset import Catalog

        sequences = Catalog(artifact, config.catalog.order).sequences
        return Counts(
            sequences.num_users, sequences.num_items, len(sequences.items), np.asarray(sequences.lengths), "exact"
        )
    catalog = config.catalog
    if catalog.source == "synthetic":
        from genrec_dist.catalog.synth_world import MEAN_LENGTH

        settings = catalog.synthetic
        return Counts(
            settings.num_users,
            settings.num_items,
            settings.num_users * MEAN_LENGTH,
            note="from the synthetic settings, before the k-core filter (upper bound)",
        )
    if catalog.source != "parquet":
        return None
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from genrec_dist.catalog.locate import locate_inputs

    files = locate_inputs(catalog)
    rows = sum(pq.read_metadata(f.path).num_rows for f in files.interactions)
    items = sum(pq.read_metadata(f.path).num_rows for f in files.items)
    # The content hash has read every byte already, so one column more is cheap. Files may share users: upper bound.
    columns = (pq.read_table(f.path, columns=["user_id"])["user_id"] for f in files.interactions)
    users = sum(pc.count_distinct(column).as_py() for column in columns)
    return Counts(users, items, rows, note="from the Parquet files, before the filters (upper bounds)")


def semantic_dim(config: Config, artifact: Path | None) -> int | None:
    """Width of the semantic embeddings, None when only the stage can tell."""
    if artifact is not None:
        return int(json.loads((artifact / "embeddings.zarr" / "zarr.json").read_text())["shape"][1])
    shape = model_shape(config.semantic)
    return shape.out_dim if shape is not None else None


def codebook_size(config: Config, counts: Counts, artifact: Path | None) -> CodebookSize:
    """Trie of the codebook: exact from the artifact, else as equal clusters would give it."""
    if artifact is None:
        return expected_codebook(config.identifiers, counts.num_items)
    from genrec_dist.identifiers.trie import Trie

    trie = Trie.load(artifact)
    widths = tuple(trie.max_children(level) for level in range(trie.max_depth))
    return CodebookSize(trie.num_nodes, trie.max_depth, int(trie.code.max()) + 1, widths)


def show_plan(
    config: Config, stages: list[Stage], store: str | Path, console: Console, probe: bool | None = None
) -> None:
    """Print the plan of a run."""
    plan = make_plan(config, stages, store, probe)
    console.print(f"[bold]{escape(config.name)}[/]: dry run, nothing is started; store {escape(str(store))}")
    _print_stages(plan, console)
    if plan.counts is not None:
        counts, mark = plan.counts, "" if plan.counts.note == "exact" else "~"
        console.print(
            f"\n[bold]Counts[/]  {mark}{counts.num_users:,} users, {mark}{counts.num_items:,} items, "
            f"{mark}{counts.num_interactions:,} interactions, {mark}{counts.num_prefixes:,} training prefixes",
            soft_wrap=True,
        )
    if plan.codebook is not None:
        book = plan.codebook
        console.print(
            f"[bold]Codebook[/]  depth {book.max_depth}, {book.num_codes} codes a level, {book.num_nodes:,} nodes"
        )
    if plan.embedding is not None:
        _print_embedding(plan.embedding, config, console)
    for loop in plan.loops:
        _print_loop(loop, config, console)
    for note in plan.notes:
        console.print(f"note: {escape(note)}", style="dim", soft_wrap=True)


def _print_stages(plan: Plan, console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("stage", "action", "key"):
        table.add_column(name)
    for title, action, key in plan.stages:
        table.add_row(escape(title), action, key)
    console.print(table)


def _print_embedding(price: Price, config: Config, console: Console) -> None:
    settings, workers = config.semantic, config.runtime.num_embed_workers
    lines = [
        f"{price.num_items:,} items, {price.mean_tokens:.1f} tokens an item, {price.num_tokens:,.0f} in all; "
        f"{price.cut_fraction:.1%} cut at {settings.max_tokens}",
        f"FLOPs: {scaled(price.flops / price.num_tokens, 'FLOP')} a token, {scaled(price.flops, 'FLOP')} in all",
        f"disk: {bytes_text(price.bytes_on_disk)} in {-(-price.num_items // price.rows_per_shard):,} shards of "
        f"{price.rows_per_shard:,} rows",
    ]
    if price.tokens_per_second is not None:
        assert price.hours is not None
        unit = "hours" if price.device.startswith("CPU") else "GPU-hours"
        lines.append(
            f"probe: {amount(price.tokens_per_second)} tokens/s on this machine ({price.device}): "
            f"{amount(price.hours)} {unit} of one engine, {amount(price.hours / workers)} hours "
            f"with runtime.num_embed_workers {workers}"
        )
    measured_on_gpu = price.tokens_per_second is not None and not price.device.startswith("CPU")
    if not measured_on_gpu and price.shape.num_parameters > LARGE_MODEL:
        hours = price.flops / (H100_TFLOPS * 1e12) / 3600
        lines.append(f"one H100 at {H100_TFLOPS} TFLOP/s, as measured with Llama2-7b: {amount(hours)} GPU-hours")
    console.print(f"\n[bold]semantic[/]: {escape(settings.model)} on {settings.engine}, {settings.dtype}")
    for line in lines:
        console.print(f"  {escape(line)}", soft_wrap=True)


def amount(value: float) -> str:
    """Three digits: '0.0123', '4.56', '1,230'."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _print_loop(loop: Loop, config: Config, console: Console) -> None:
    size, batches, memory = loop.size, loop.batches, loop.memory
    console.print(f"\n[bold]{loop.name}[/]: {size.num_parameters:,} parameters")
    for group, number in size.parameters.items():
        console.print(f"  {group:<22}{number:>14,}")
    for group, number in size.constants.items():
        console.print(f"  {group:<22}{number:>14,}  constant")
    console.print(
        f"  batch: {batches.samples:,} samples / {batches.batch_size} = {batches.steps_per_epoch:,} steps an epoch, "
        f"{batches.per_worker} samples a worker (runtime.num_workers {config.runtime.num_workers}), at most "
        f"{batches.epochs} epochs = {batches.total_steps:,} steps",
        soft_wrap=True,
    )
    flops = size.training_flops
    console.print(
        f"  FLOPs: {scaled(flops, 'FLOP')} a sample, {scaled(flops * batches.samples, 'FLOP')} an epoch "
        f"(training = 3 x forward, histories padded)",
        soft_wrap=True,
    )
    parts = ", ".join(f"{kind} {bytes_text(value)}" for kind, value in memory.items() if value)
    console.print(f"  memory a worker: {bytes_text(sum(memory.values()))} ({parts})", soft_wrap=True)


def scaled(value: float, unit: str) -> str:
    """'1.2 GFLOP'."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} E{unit}"


def bytes_text(value: float) -> str:
    """'340 KiB', '12.1 MiB' or '1.3 GiB'."""
    for unit in ("KiB", "MiB"):
        value /= 1024
        if value < 1000:
            return f"{value:.3g} {unit}"
    return f"{value / 1024:,.1f} GiB"
