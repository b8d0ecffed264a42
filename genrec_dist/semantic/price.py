"""What an embedding job will cost, before it is started: tokens, FLOPs, hours, bytes.

Tokens come from a sample of the items, FLOPs from the model's shape, hours from a probe of a few layers of that shape
with random weights, so that neither the weights nor the full model are needed. Reads; makes no file.
"""

from __future__ import annotations

import gzip
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.artifacts.embeddings import bytes_per_value
from genrec_dist.catalog.ingest import parse_file
from genrec_dist.catalog.locate import InputFile, locate_inputs
from genrec_dist.config import CatalogConfig, Config, SemanticConfig
from genrec_dist.errors import DataError
from genrec_dist.semantic.encoders import Shape, model_shape, resolve_model
from genrec_dist.semantic.stage import rows_per_shard
from genrec_dist.semantic.text import FIELDS, item_texts
from genrec_dist.semantic.tokens import TextTokenizer

SAMPLE_ITEMS = 2000
CHARS_PER_TOKEN = 3.2
"""Of product titles, brands and categories: 3.0 to 3.3 with a BPE vocabulary of 32,000 on Amazon Beauty, Sports and
Toys. Used where the model's own tokenizer is not on this machine."""
PROBE_LAYERS = (1, 3)
PROBE_CPU_FLOPS = 3e10


@dataclass
class Price:
    """Cost of one embedding job.

    Args:
        num_items: items to embed.
        lengths: tokens of the sampled items after cutting, (n,) int64.
        cut_fraction: share of the sample that is cut off at `semantic.max_tokens`.
        shape: of the model.
        bytes_on_disk: of the stored vectors.
        rows_per_shard: rows of a shard.
        notes: how the numbers came about where they are not exact.
        tokens_per_second: of one engine on this machine, None without a probe.
        device: what the probe ran on.
    """

    num_items: int
    lengths: np.ndarray
    cut_fraction: float
    shape: Shape
    bytes_on_disk: int
    rows_per_shard: int
    notes: list[str] = field(default_factory=list)
    tokens_per_second: float | None = None
    device: str = ""

    @property
    def mean_tokens(self) -> float:
        return float(self.lengths.mean())

    @property
    def num_tokens(self) -> float:
        return self.mean_tokens * self.num_items

    @property
    def flops(self) -> float:
        """Of the whole job; a token attends to sum n^2 / sum n others on average."""
        lengths = self.lengths.astype(np.float64)
        return self.shape.flops(self.num_tokens, float((lengths**2).sum() / lengths.sum()))

    @property
    def hours(self) -> float | None:
        """Of one engine."""
        return None if self.tokens_per_second is None else self.num_tokens / self.tokens_per_second / 3600


def price_embedding(config: Config, num_items: int | None, catalog: Path | None, probe: bool) -> Price | None:
    """Price the semantic stage of a configuration.

    Args:
        config: resolved configuration.
        num_items: items of the catalog where they are known.
        catalog: finished catalog artifact, or None: then the input files are sampled.
        probe: time layers of the model's shape on this machine.

    Returns:
        None when nothing can be said: finished embeddings are read, or the model's shape is not known here.
    """
    settings = config.semantic
    shape = model_shape(settings)
    if settings.engine == "precomputed" or shape is None:
        return None
    notes: list[str] = []
    items, counted = _sample(config.catalog, catalog, notes)
    num_items = num_items or counted
    if not num_items or not len(items):
        return None
    texts, _ = item_texts(items, settings.template)
    lengths, cut = _lengths(settings, texts, notes)
    price = Price(
        num_items=num_items,
        lengths=lengths,
        cut_fraction=float(cut.mean()),
        shape=shape,
        bytes_on_disk=num_items * shape.out_dim * bytes_per_value(settings.store_dtype),
        rows_per_shard=rows_per_shard(settings),
        notes=notes,
    )
    if probe:
        price.tokens_per_second, price.device = probe_speed(settings, shape, lengths, config.runtime.device)
    return price


def _sample(catalog: CatalogConfig, folder: Path | None, notes: list[str]) -> tuple[pa.Table, int | None]:
    """Some items, and how many there are where only the files tell."""
    if folder is not None:
        with pq.ParquetFile(folder / "items.parquet") as file:
            rows = file.metadata.num_rows
            groups = np.random.default_rng(0).permutation(file.num_row_groups)[:4]
            table = file.read_row_groups(sorted(groups.tolist()), columns=list(FIELDS))
        chosen = np.sort(np.random.default_rng(0).permutation(len(table))[:SAMPLE_ITEMS])
        notes.append(f"tokens from {len(chosen):,} items drawn from the catalog")
        return table.take(chosen), rows
    if catalog.source == "synthetic":
        return pa.table({}), None
    try:
        files = locate_inputs(catalog).items
    except DataError:
        return pa.table({}), None
    parts, wanted = [], -(-SAMPLE_ITEMS // max(1, len(files)))
    for number, file in enumerate(files):
        left = wanted
        for table in parse_file(str(file.path), number, catalog.source, "items"):
            parts.append(table.slice(0, left).select(list(FIELDS)))
            left -= len(table)
            if left <= 0:
                break
    if not parts:
        return pa.table({}), None
    sample = pa.concat_tables(parts)
    notes.append(f"tokens from the first {len(sample):,} items of the metadata files; filters may keep fewer items")
    return sample, sum(_count_rows(file, catalog.source) for file in files)


def _count_rows(file: InputFile, source: str) -> int:
    """Rows of a metadata file: exact for Parquet, from the length of its first lines otherwise."""
    if source == "parquet":
        return pq.read_metadata(file.path).num_rows
    size = file.path.stat().st_size
    with open(file.path, "rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        lines = 0
        for _ in gzip.GzipFile(fileobj=raw) if compressed else raw:
            lines += 1
            if lines == 20 * SAMPLE_ITEMS:
                return int(lines * size / raw.tell())
    return lines


def _lengths(settings: SemanticConfig, texts: list[str], notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each text after cutting, and which are cut."""
    from transformers import AutoTokenizer

    source = resolve_model(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=False, local_files_only=True
        )
        ids, cut = TextTokenizer(tokenizer, settings.max_tokens)(texts)
        return np.array([len(row) for row in ids], np.int64), cut
    except (OSError, ValueError):  # the hub's files are not on this machine, and a dry run fetches nothing
        notes.append(
            f"tokens counted as characters / {CHARS_PER_TOKEN:g}: the model's tokenizer is not on this machine"
        )
        counted = np.array([1 + len(text) / CHARS_PER_TOKEN for text in texts]).round().astype(np.int64)
        return np.minimum(counted, settings.max_tokens), counted > settings.max_tokens


def probe_speed(settings: SemanticConfig, shape: Shape, lengths: np.ndarray, device: str) -> tuple[float, str]:
    """Tokens per second of one engine, from layers of the model's shape with random weights.

    Two depths are timed on one batch of real lengths; a layer is their difference, the rest is what is left.

    Args:
        settings: dtype is used.
        shape: of the model.
        lengths: tokens of sampled items, (n,) int64.
        device: 'auto', 'cpu' or 'cuda'.

    Returns:
        Tokens per second, and the name of the device.
    """
    import torch

    on = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    deepest = 2.0 * shape.layer_parameters * PROBE_LAYERS[-1]
    batch = _middle_batch(lengths, 32768 if on == "cuda" else min(4096, max(32, PROBE_CPU_FLOPS / deepest)))
    times = []
    for depth in PROBE_LAYERS:
        model = _layers(shape, depth, on, getattr(torch, settings.dtype))
        times.append(_seconds(model, batch, on, 5))
        del model
    few, many = PROBE_LAYERS
    layer = max((times[1] - times[0]) / (many - few), 1e-9)
    total = max(times[0] - few * layer, 0.0) + shape.num_layers * layer
    name = torch.cuda.get_device_name() if on == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return float(batch.sum()) / total, name


def _middle_batch(lengths: np.ndarray, tokens: float) -> np.ndarray:
    """Lengths of a batch of about `tokens` tokens, neither the longest texts nor the shortest."""
    wanted = max(1, round(tokens / lengths.mean()))
    order = np.sort(np.tile(lengths, -(-wanted // len(lengths))))
    first = (len(order) - wanted) // 2
    return order[first : first + wanted]


def _layers(shape: Shape, depth: int, device: str, dtype):
    """A decoder or encoder with a few layers of a shape; its weights are a short random row again and again."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    common: dict[str, Any] = {
        "vocab_size": 1000,  # a look-up costs nothing beside the layers
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": 8192,
    }
    with torch.device("meta"):  # the libraries' own start takes longer than the probe
        if shape.causal:
            common |= {"num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "use_cache": False}
            model: Any = LlamaModel(LlamaConfig(**common))
        else:
            model = BertModel(BertConfig(**common), add_pooling_layer=False)
    model = model.to(dtype).to_empty(device=device).eval()
    row = torch.randn(1 << 20, device=device, dtype=torch.float32).mul_(0.02).to(dtype)
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(len(row)):
            part.copy_(row[: len(part)])
    for buffer in model.buffers():
        buffer.zero_()
    return model


def _seconds(model, lengths: np.ndarray, device: str, repeats: int) -> float:
    """Median seconds of a padded forward pass."""
    import torch

    longest = int(lengths.max())
    mask = torch.from_numpy((np.arange(longest) < lengths[:, None]).astype(np.int64)).to(device)
    tokens = torch.randint(1000, mask.shape, device=device)
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):  # the first one warms up
            began = time.perf_counter()
            model(input_ids=tokens, attention_mask=mask)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))
