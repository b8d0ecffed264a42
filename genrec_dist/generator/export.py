"""A trained generator as a folder of its own, for programs that only recommend: no run, no store, no Ray, no DeepSpeed.

Writes and reads
- model.safetensors: the trained parameters, byte for byte those of the run's artifact;
- codebook.safetensors: codes and trie of all items;
- integrated.safetensors (PRORec): `integrated`, (num_items, N) float32, Stage I embeddings that the model keeps frozen;
- items.parquet: item_index (= row, what the model calls an item), item_id, title;
- config.json: what the model is made of, what the run evaluated it with, and where it comes from.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from genrec_dist import __version__
from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.artifacts.reader import read_embeddings
from genrec_dist.artifacts.store import problems_of
from genrec_dist.artifacts.tensors import save_tensors
from genrec_dist.config import GeneratorConfig, GptConfig
from genrec_dist.errors import ArtifactError
from genrec_dist.generator.gpt import GptGenerator
from genrec_dist.generator.model import Generator
from genrec_dist.generator.parameters import MODEL, load_parameters
from genrec_dist.identifiers import trie as codebook
from genrec_dist.identifiers.trie import Trie
from genrec_dist.runs import RunFolder

FORMAT = 1
CONFIG, TABLE, ITEMS = "config.json", "integrated.safetensors", "items.parquet"
NODES = "head.nodes.weight"


def export_run(run: RunFolder, out: Path) -> dict[str, Any]:
    """Fill an empty folder with the run's generator, and load it once.

    Args:
        run: a finished run of a method that generates codes.
        out: the folder. What makes it an artifact, its manifest, is the caller's.

    Returns:
        What config.json holds.

    Raises:
        ConfigError: the run has no generator, or has not trained it yet.
        ArtifactError: one of the run's artifacts is damaged.
    """
    config = run.generative_config()
    section = "generator" if config.method == "prorec" else "gpt"
    titles = ["catalog", "identifiers", section, *(["fusion"] if section == "generator" else [])]
    sources = {title: _sound(run.artifact(title)) for title in titles}
    shutil.copyfile(sources[section] / MODEL, out / MODEL)
    shutil.copyfile(sources["identifiers"] / codebook.FILE, out / codebook.FILE)
    items = pq.read_table(sources["catalog"] / ITEMS, columns=["item_index", "item_id", "title"])
    pq.write_table(items, out / ITEMS)
    if section == "generator":
        save_tensors({"integrated": torch.from_numpy(read_embeddings(sources["fusion"]))}, out / TABLE)
    trie, links = Trie.load(out), run.links()
    has_token = section == "generator" and config.generator.distill_weight > 0
    record = {
        "format": FORMAT,
        "genrec_dist": __version__,
        "run": config.name,
        "keys": {title: links[title]["key"] for title in titles},
        "method": config.method,
        "section": section,
        section: getattr(config, section).model_dump(mode="json"),
        "order": config.catalog.order,
        "beam_width": config.evaluation.beam_width,
        "mix_weight": config.evaluation.mix_weight if has_token else 0.0,
        "num_items": trie.num_items,
        "num_codes": trie.num_codes,
        "max_depth": trie.max_depth,
        "num_nodes": trie.num_nodes,
        "shapes": _shapes(out / MODEL),
    }
    write_json(out / CONFIG, record)
    load_exported(out, check=False)
    return record


def load_exported(folder: str | Path, check: bool = True) -> Generator | GptGenerator:
    """The generator of an exported folder, in eval mode, on the CPU.

    Args:
        folder: made by `genrec export`.
        check: compare the SHA-256 of every file; False: only that parameters fit the model.

    Raises:
        ArtifactError: a file is missing or damaged, or the folder is of a version that this one does not read.
    """
    folder = Path(folder)
    record = _read_config(folder)
    if check:
        _sound(folder)
    section, trie = record["section"], Trie.load(folder)
    try:
        if section == "generator":
            table = load_file(folder / TABLE)["integrated"]
            return load_parameters(Generator(GeneratorConfig(**record[section]), trie, table), folder, section)
        config = GptConfig(**record[section])
        # The table that nodes of a child head start from has done its work: the trained ones take their place.
        start = torch.zeros(trie.num_items, record["shapes"][NODES][1]) if config.head == "child" else None
        return load_parameters(GptGenerator(config, trie, start), folder, section)
    except (ValidationError, KeyError, TypeError) as error:
        raise _unreadable(folder, f"{type(error).__name__}: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        record = read_json(folder / CONFIG)
        found = record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, f"{type(error).__name__}: {error}") from error
    if found != FORMAT:
        raise _unreadable(folder, f"format {found} of genrec_dist {record.get('genrec_dist')}")
    return record


def _unreadable(folder: Path, got: str) -> ArtifactError:
    return ArtifactError(
        "not an exported generator that this version reads",
        where=folder / CONFIG,
        got=got,
        expected=f"format {FORMAT}, as genrec_dist {__version__} writes it",
        fix="export the run again with this version",
    )


def _sound(folder: Path) -> Path:
    problems = problems_of(folder)
    if problems:
        raise ArtifactError(
            "artifact is damaged",
            where=folder,
            got="; ".join(problems[:5]),
            expected="the sizes and SHA-256 of its manifest",
            fix="build it again: the command that made it puts damaged artifacts aside; an export is made anew",
        )
    return folder


def _shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, "pt") as tensors:
        return {name: list(tensors.get_slice(name).get_shape()) for name in sorted(tensors.keys())}
