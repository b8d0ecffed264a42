"""What search reads of a generator again and again, computed once an evaluation.

Node embeddings at length 1, and the decoder's input for every node that has children: neither depends on the user.
Tables belong to the weights that they were made of: make them at the start of an evaluation, drop them at its end. They
are one more copy of the node embeddings (cosine head only) and one row of the decoder's width for each inner node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from genrec_dist.generator.beam_decoder import make_decoder
from genrec_dist.generator.child_scores import Kernel, finish, make_child_scores
from genrec_dist.generator.heads import ChildHead, PerLevelHead
from genrec_dist.training.worker import exact_products

if TYPE_CHECKING:
    from genrec_dist.generator.beam import CodeGenerator

TOKEN_ROWS = 1 << 16
"""Nodes whose inputs are computed at a time."""


class SearchTables:
    """Prepared state of search over one model with its present weights.

    Args:
        model: generator in eval mode, on its device.
        kernel: how children are scored; 'auto' by the device.

    Raises:
        ConfigError: a kernel that the device does not have.
    """

    @torch.no_grad()
    def __init__(self, model: CodeGenerator, kernel: Kernel = "auto") -> None:
        trie, head = model.trie, model.head
        self.trie, self.head = trie, head
        self.kernel = make_child_scores(trie, kernel)
        inner = trie.num_children > 0
        inner[0] = False  # the root is no input
        nodes = inner.nonzero()[:, 0]
        self._row = (inner.cumsum(0) - 1).clamp(min=0)
        self._tokens = _inner_tokens(model, nodes)
        self.decoder = make_decoder(model, self._tokens, openers=int((trie.level[nodes] == 1).sum()))
        leaf_levels = trie.level[trie.num_children == 0]
        self._shallowest = int(leaf_levels.min())
        self._nodes = head._unit(head.nodes.table).contiguous() if isinstance(head, ChildHead) else None
        self._made_of = _versions(model)
        self._model = model

    def check(self) -> None:
        """Refuse to go on with other weights than the tables were made of.

        Raises:
            RuntimeError: a parameter of the model changed or was replaced.
        """
        if _versions(self._model) != self._made_of:
            raise RuntimeError("the model's weights changed after SearchTables were made of them: make them anew")

    def tokens(self, nodes: torch.Tensor) -> torch.Tensor:
        """Decoder inputs of inner nodes, each at its own level, as `path_tokens` makes them; (..., D)."""
        return self._tokens[self._row[nodes]]

    def token_rows(self, nodes: torch.Tensor) -> torch.Tensor:
        """Where the decoder finds the inputs of inner nodes."""
        return self._row[nodes]

    def leaves_above(self, level: int) -> bool:
        """Whether a path can have ended at `level` or above."""
        return self._shallowest <= level

    def child_scores(
        self, hidden_RD: torch.Tensor, nodes_R: torch.Tensor, scores_R: torch.Tensor, level: int
    ) -> torch.Tensor:
        """Log-probability of each child given its node, plus the score of the beam.

        Args:
            hidden_RD: decoder states that predict the next code.
            nodes_R: nodes at `level`; others have no children here.
            scores_R: what is added.
            level: 0 is the root.

        Shapes:
            returns: (R, C) float32, -inf where no child is.
        """
        head = self.head
        if isinstance(head, PerLevelHead):
            return self.kernel.by_code(head.code_logits(hidden_RD, level), nodes_R, scores_R, level)
        if self._nodes is None:
            return finish(head(hidden_RD, nodes_R, level).float(), scores_R)
        query = head.query(hidden_RD)
        with torch.autocast(query.device.type, enabled=False), exact_products():
            query = query.float()
            if head.kind == "cosine":
                query *= head.scale / query.norm(dim=1, keepdim=True).clamp(min=1e-12)
            else:
                query *= head.scale
            if level == 0:  # dense first level: the same children for every row
                return finish(query @ self._nodes[1 : 1 + self.trie.widths[0]].T, scores_R)
            return self.kernel.by_query(query, self._nodes, nodes_R, scores_R, level)


def _inner_tokens(model: CodeGenerator, nodes: torch.Tensor) -> torch.Tensor:
    """Decoder inputs of nodes, which are ordered by level."""
    if not len(nodes):
        return model.start_tokens(1)[0, :0]
    levels, counts = torch.unique_consecutive(model.trie.level[nodes], return_counts=True)
    parts = []
    for level, of_level in zip(levels.tolist(), nodes.split(counts.tolist())):
        parts += [model.path_tokens(some[:, None], level)[:, 0] for some in of_level.split(TOKEN_ROWS)]
    return torch.cat(parts)


def _versions(model: CodeGenerator) -> list[tuple[int, int]]:
    """Where each parameter lies and how often it was written in place."""
    parameters = getattr(model, "parameters", None)
    return [(p.data_ptr(), p._version) for p in parameters()] if parameters else []
