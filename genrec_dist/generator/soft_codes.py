"""Codes as a teacher would give them: its probabilities of items, added up below the nodes of the tree.

Shape legend: B rows, N items, C children (padded to the widest node of the level), K codes of a level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from genrec_dist.generator.heads import DeviceTrie

LEAST = 1e-30


class SoftCodes:
    """Shares of the children of nodes in a teacher's probability of the node, as labels beside the true ones.

    Args:
        trie: tree.
        items_BN: probability of each item.
        weight: of these labels; the true ones have the rest.

    Shapes:
        items_BN: (B, N) float32.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2, at each level of the true
    item's path.
    """

    def __init__(self, trie: DeviceTrie, items_BN: torch.Tensor, weight: float) -> None:
        self.trie, self.items_BN, self.weight = trie, items_BN, weight
        self.masses = node_masses(trie, items_BN)

    def shares(self, nodes_B: torch.Tensor, level: int) -> torch.Tensor:
        """Shares of the children of nodes, (B, C); all 0 for a node without probability, or not at `level`."""
        trie = self.trie
        children, valid = trie.children_of(nodes_B, level)
        place = (children - trie.level_start[level + 1]).clamp(min=0)
        mass = self.masses[level].gather(1, place) * (valid & (trie.level[nodes_B] == level)[:, None])
        return mass / mass.sum(1, keepdim=True).clamp(min=LEAST)

    def mixed(
        self,
        hard: torch.Tensor,
        logits: torch.Tensor,
        nodes_B: torch.Tensor,
        label_B: torch.Tensor,
        level: int,
        by_code: bool,
    ) -> torch.Tensor:
        """Cross-entropy against both labels, a scalar; a row of which the teacher says nothing has the true one alone.

        Args:
            hard: summed cross-entropy against the true ones.
            logits: of the children of the nodes, (B, C), or, `by_code`, of all codes, (B, K).
            label_B: -100 where a row does not count.
        """
        shares = self.shares(nodes_B, level)
        if by_code:
            codes = self.trie.code[self.trie.children_of(nodes_B, level)[0]].clamp(min=0)
            shares = torch.zeros_like(logits).scatter_add(1, codes, shares)
        silent = (shares.sum(1, keepdim=True) == 0).to(shares)  # where the teacher's probability underflows
        shares = shares.scatter_add(1, label_B.clamp(min=0)[:, None], silent) * (label_B >= 0)[:, None]
        return self._mixed(hard, logits, shares)

    def mixed_items(self, hard: torch.Tensor, logits_BN: torch.Tensor) -> torch.Tensor:
        """The same of the items themselves."""
        return self._mixed(hard, logits_BN, self.items_BN)

    def _mixed(self, hard: torch.Tensor, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        return (1 - self.weight) * hard + self.weight * soft_cross_entropy(logits, shares)


def node_masses(trie: DeviceTrie, items_BN: torch.Tensor) -> list[torch.Tensor]:
    """Sums of the items' numbers below each node: (B, nodes of the level) for each level from 1 on."""
    masses: list[torch.Tensor] = []
    for level in range(trie.max_depth, 0, -1):
        start, stop = trie.level_start[level : level + 2]
        item = trie.node_item[start:stop]
        mass = items_BN[:, item.clamp(min=0)] * (item >= 0)
        if masses:
            parents = trie.parent[stop : stop + masses[-1].shape[1]] - start
            mass = mass.index_add(1, parents, masses[-1])
        masses.append(mass)
    return masses[::-1]


def soft_cross_entropy(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy against shares; classes of logit -inf have none."""
    log_p = F.log_softmax(logits, 1)
    return -(shares * log_p.masked_fill(~torch.isfinite(log_p), 0.0)).sum()
