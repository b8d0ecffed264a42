"""Recommendations for one history from a finished run."""

from __future__ import annotations

import torch

from genrec_dist.catalog.dataset import Catalog
from genrec_dist.errors import ConfigError, DataError
from genrec_dist.generator.beam import CodeGenerator, beam_search
from genrec_dist.generator.gpt_stage import load_gpt
from genrec_dist.generator.stage import load_model
from genrec_dist.runs import RunFolder
from genrec_dist.training.worker import pick_device


def recommend(run: RunFolder, history: list[str], top_k: int, device: str = "auto") -> list[dict]:
    """The next items that the run's generator proposes; items of the history are left out.

    Args:
        run: a finished run of a method that generates codes.
        history: item ids, oldest first; the last `max_history` of the method's generator count.
        top_k: number of items.
        device: 'auto', 'cpu' or 'cuda'.

    Returns:
        item_id, title, score (log-probability, plus the weighted dense logit where the run mixes it) and
        item_index, best first.

    Raises:
        ConfigError: the run has no generator, or `top_k` is not positive.
        DataError: an item id is not in the run's catalog, or there is none.
    """
    config = run.generative_config()
    if top_k < 1:
        raise ConfigError("not a number of items", where="--top-k", got=top_k, expected="at least 1")
    catalog = Catalog(run.artifact("catalog"), config.catalog.order)
    index = {item_id: i for i, item_id in enumerate(catalog.item_ids)}
    unknown = [item for item in history if item not in index]
    if unknown or not history:
        raise DataError(
            "history holds items that the catalog does not have" if history else "history is empty",
            where="--history",
            got=unknown[:5],
            expected=f"item ids of {run.artifact('catalog')}/items.parquet",
        )
    target = pick_device(device)
    model = load_generator(run, target)
    seen = [index[item] for item in history]
    recent = torch.tensor([seen[-model.max_history :]], device=target)
    width = min(max(config.evaluation.beam_width, top_k + len(set(seen))), model.trie.num_items)
    everything = torch.ones_like(recent, dtype=torch.bool)
    items, scores, _ = beam_search(model, recent, everything, width, config.evaluation.mix_weight)
    ranked = [
        {"item_id": catalog.item_ids[i], "title": catalog.titles[i], "score": round(score, 4), "item_index": i}
        for i, score in zip(items[0].tolist(), scores[0].tolist())
        if i >= 0 and i not in seen
    ]
    return ranked[:top_k]


def load_generator(run: RunFolder, device: torch.device) -> CodeGenerator:
    """The trained generator of a run, in eval mode.

    Raises:
        ConfigError: the run's method has none.
    """
    config, identifiers = run.generative_config(), run.artifact("identifiers")
    if config.method == "prorec":
        return load_model(config.generator, run.artifact("fusion"), identifiers, run.artifact("generator")).to(device)
    return load_gpt(config.gpt, identifiers, run.artifact("gpt")).to(device)
