"""Finished runs with tiny artifacts and random weights. For tests of what reads a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.store import write_manifest
from genrec_dist.artifacts.tensors import save_tensors
from genrec_dist.collaborative.fusion import FusionModel
from genrec_dist.config import Config, EvaluationConfig, FusionConfig
from genrec_dist.identifiers.trie import Trie
from genrec_dist.runs import RunFolder
from genrec_dist.testing.tiny import (
    tiny_embeddings,
    tiny_generator,
    tiny_gpt,
    tiny_sequences,
    write_tiny_catalog,
)


def tiny_run(
    root: Path, name: str, trie: Trie, method: str, fusion: FusionConfig | None = None, **settings: Any
) -> RunFolder:
    """A finished run of 30 users.

    Args:
        root: gets `store` and `runs`.
        trie: codes of all items.
        method: 'prorec', 'csj_id' or 'semantic_id'.
        fusion: a Stage I for the run of `prorec`; None: only what it would have written.
        settings: overrides of the generator's section.
    """
    prorec = method == "prorec"
    model = (tiny_generator if prorec else tiny_gpt)(trie, seed=3, **settings)
    section = "generator" if prorec else "gpt"
    store = root / "store"
    folders = {stage: store / stage for stage in ("catalog", "semantic", "fusion", "identifiers", section)}
    write_tiny_catalog(folders["catalog"], tiny_sequences(30, trie.num_items, shortest=4))
    trie.save(folders["identifiers"])
    table = folders["fusion" if prorec else "identifiers"]
    table.mkdir(parents=True, exist_ok=True)
    write_embeddings(table, tiny_embeddings(trie.num_items, seed=3))
    folders[section].mkdir()
    _save_trained(model, folders[section])
    if fusion is not None:
        folders["semantic"].mkdir()
        text = tiny_embeddings(trie.num_items, seed=4)
        write_embeddings(folders["semantic"], text)
        _save_trained(FusionModel(fusion, torch.from_numpy(text)), folders["fusion"])
    run = RunFolder(root / "runs", name)
    sections: dict[str, Any] = {section: model.config} | ({} if fusion is None else {"fusion": fusion})
    evaluation = EvaluationConfig(beam_width=20, mix_weight=0.3)
    run.create(Config.model_validate({"name": name, "method": method, "evaluation": evaluation, **sections}), [])
    for title, folder in folders.items():
        if folder.exists():
            write_manifest(folder, {"stage": title, "key": "0"})
            run.link(title, title, f"key-of-{title}", folder)
    return run


def _save_trained(model: nn.Module, folder: Path) -> None:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state: dict[str, torch.Tensor] = model.state_dict()
    save_tensors({name: value for name, value in state.items() if name not in frozen}, folder / "model.safetensors")
