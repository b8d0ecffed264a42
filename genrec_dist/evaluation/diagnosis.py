"""Where a generator loses its users' next items: in Stage I, at the code of each level, or in the beam.

All figures are of the same users, who are scored over the whole catalog. Reads the artifacts of a run, writes nothing.

Shape legend: B batch, N items, M nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch

from genrec_dist.catalog.dataset import Sequences
from genrec_dist.collaborative.backbones import history_of
from genrec_dist.evaluation.dense import target_ranks
from genrec_dist.evaluation.generative import DenseRanker, GenerativeRanker
from genrec_dist.evaluation.metrics import rank_metrics
from genrec_dist.evaluation.ranking import EXACT_BATCH
from genrec_dist.generator.beam import DenseGenerator, node_log_probabilities
from genrec_dist.generator.heads import DeviceTrie
from genrec_dist.training.samples import HistorySamples, holdout_samples

Ranks = dict[str, torch.Tensor]
KINDS = ("prefix", "code", "items")


@torch.no_grad()
def diagnose(
    generator: GenerativeRanker,
    dense: dict[str, DenseRanker],
    sequences: Sequences,
    users: np.ndarray,
    split: str,
    cutoffs: Sequence[int],
    say: Callable[[int], None] = lambda done: None,
) -> dict:
    """Recall of each way of ranking, and of the codes of each level.

    Args:
        generator: a generator in eval mode, with its beam.
        dense: models that score the whole catalog at once, by name.
        sequences: of the catalog.
        users: who is looked at, each with at least three items.
        split: 'test' or 'valid'.
        cutoffs: of the metrics, ascending.
        say: told how many users are done.

    Shapes:
        users: (U,) int64.

    Returns:
        `rankings`: metrics by name: `beam` as it is evaluated, `beam_of_codes` without the distillation token's score
        where that is mixed in, `exact` probabilities of all items, `token`, the distillation token alone where it
        stands at the start, and each of `dense`.
        `levels`: one a level of codes: `nodes`, prefixes of that length; `prefix`, metrics of the target's prefix among
        all of them; `code`, the same among those that share the codes before; `items`, metrics of the target among
        the items of its prefix. What `items` gains at a level is what choosing that code loses.
    """
    model = generator.model
    tree = _Levels(model.trie)
    device = model.trie.item_path.device

    def samples_for(ranker: GenerativeRanker | DenseRanker) -> HistorySamples:
        return holdout_samples(sequences, ranker.max_history, split, device, users=users, times=ranker.times)[0]

    samples, others = samples_for(generator), {name: samples_for(ranker) for name, ranker in dense.items()}
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for start in range(0, len(users), EXACT_BATCH):
        places = torch.arange(start, min(start + EXACT_BATCH, len(users)), device=device)
        batch = samples.gather(places, generator.max_history)
        history, mask, *times = history_of(batch)
        log_p = node_log_probabilities(model, history, mask, generator.tables, *times)
        ranks = generator(batch) | tree.ranks(log_p, batch["target"])
        if model.dense_token == "start":
            scorer = cast(DenseGenerator, model)
            hidden, _, _ = scorer.begin(history, mask, *times)
            ranks["token"] = target_ranks(scorer.dense_logits(scorer.distilled(hidden[:, 0])), batch["target"])
        for name, ranker in dense.items():
            ranks[name] = ranker(others[name].gather(places, ranker.max_history))["rank"]
        for name, values in ranks.items():
            found[name].append(values.cpu().numpy())
        say(start + len(places))
    metrics = {name: rank_metrics(np.concatenate(parts), cutoffs) for name, parts in found.items()}
    named = {"beam": "rank", "beam_of_codes": "rank_without_mix", "exact": "exact", "token": "token"}
    rankings = {name: metrics[source] for name, source in named.items() if source in metrics}
    levels = [
        {"level": level, "nodes": len(nodes)} | {kind: metrics[f"{kind}_{level}"] for kind in KINDS}
        for level, nodes in enumerate(tree.nodes, 1)
    ]
    return {
        "users": len(users),
        "beam_width": generator.width,
        "mix_weight": generator.mix_weight,
        "rankings": rankings | {name: metrics[name] for name in dense},
        "levels": levels,
    }


class _Levels:
    """Ranks of targets among the prefixes of each length.

    An item whose codes are fewer keeps its leaf at the levels behind.
    """

    def __init__(self, trie: DeviceTrie) -> None:
        self.trie = trie
        self.nodes, self.place, self.member = [], [], []
        items = torch.arange(trie.num_items, device=trie.item_path.device)
        for level in range(trie.max_depth):
            nodes, place = torch.unique(trie.item_path[:, level], return_inverse=True)
            self.nodes.append(nodes)
            self.place.append(place)
            self.member.append(torch.empty_like(nodes).scatter_(0, place, items))  # any item below the node

    def ranks(self, log_p_BM: torch.Tensor, target_B: torch.Tensor) -> Ranks:
        """(B,) int64 each; equal probabilities are ordered by node, or item."""
        path, out = self.trie.item_path, {}
        items_BN = log_p_BM[:, path[:, -1]]
        out["exact"] = target_ranks(items_BN, target_B)
        before_BN = torch.ones_like(items_BN, dtype=torch.bool)
        for level, (nodes, place, member) in enumerate(zip(self.nodes, self.place, self.member), 1):
            prefix_BK, own_B = log_p_BM[:, nodes], place[target_B]
            out[f"prefix_{level}"] = target_ranks(prefix_BK, own_B)
            siblings_BK = prefix_BK.masked_fill(~before_BN[:, member], float("-inf"))
            out[f"code_{level}"] = target_ranks(siblings_BK, own_B)
            before_BN = place == own_B[:, None]
            out[f"items_{level}"] = target_ranks(items_BN.masked_fill(~before_BN, float("-inf")), target_B)
        return out
