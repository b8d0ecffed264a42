"""Log-probabilities item by item, one row at a time, straight from the codes: no trie, no beam, no cache, no mask.

The only parts of the generator it uses are its layers and weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from genrec_dist.generator.model import Generator


def node_numbers(codes: np.ndarray, depth: np.ndarray) -> dict[tuple[int, ...], int]:
    """Prefix -> node number: level by level, within a level by (parent, code)."""
    numbers: dict[tuple[int, ...], int] = {(): 0}
    for level in range(1, codes.shape[1] + 1):
        prefixes = {tuple(codes[i, :level].tolist()) for i in range(len(codes)) if depth[i] >= level}
        for prefix in sorted(prefixes, key=lambda p: (numbers[p[:-1]], p[-1])):
            numbers[prefix] = len(numbers)
    return numbers


class BruteForce:
    """Exhaustive scorer of one generator.

    Args:
        model: in eval mode.
        codes, depth: the codebook.
    """

    def __init__(self, model: Generator, codes: np.ndarray, depth: np.ndarray) -> None:
        self.model: Any = model
        self.codes, self.depth = codes, depth
        self.numbers = node_numbers(codes, depth)

    def path(self, item: int) -> list[tuple[int, ...]]:
        """Prefixes of an item's codes, shortest first."""
        code = self.codes[item, : self.depth[item]].tolist()
        return [tuple(code[:n]) for n in range(1, len(code) + 1)]

    def code_token(self, prefix: tuple[int, ...]) -> torch.Tensor:
        """Embedding of the (level, code) at the end of a prefix."""
        num_codes = int(self.codes.max()) + 1
        return self.model.code_in.weight[(len(prefix) - 1) * num_codes + prefix[-1]]

    def decoder_token(self, prefix: tuple[int, ...]) -> torch.Tensor:
        model = self.model
        if model.config.head == "per_level":
            return self.code_token(prefix)
        node = model.head.nodes.table[self.numbers[prefix]]
        if model.config.head_similarity == "cosine":
            node = node / node.norm()
        return model.node_in(node)

    def memory(self, history: list[int]) -> torch.Tensor:
        """Encoder output of one unpadded history, (1, S, D)."""
        model, rows = self.model, []
        for place, item in enumerate(history):
            position = model.position.weight[len(history) - 1 - place]
            if model.config.encoder_input == "item":
                rows.append(model.item_in(model.item.table[item]) + position)
            else:
                rows += [self.code_token(prefix) + position for prefix in self.path(item)]
        x = model.source_norm(torch.stack(rows)[None])
        for layer in model.encoder:
            x = sum(layer(x, None, None))
        return model.encoder_norm(x)

    def states(self, history: list[int], item: int) -> torch.Tensor:
        """Decoder states over the teacher-forced input of one item with the token at its place, (T, D)."""
        model, step = self.model, self.model.step.weight
        tokens = [model.bos + step[0]] + [self.decoder_token(p) + step[len(p)] for p in self.path(item)]
        if model.config.distill_weight:
            token = model.dis + step[self.codes.shape[1] + 1]
            tokens = [token, *tokens] if model.config.distill_position == "start" else [*tokens, token]
        x = torch.stack(tokens)[None]
        memory = self.memory(history)
        everything = torch.ones(1, 1, 1, memory.shape[1], dtype=torch.bool)
        for layer in model.decoder:
            x = sum(layer(x, None, memory, everything))
        return model.decoder_norm(x)[0]

    def code_logits(self, state: torch.Tensor, prefix: tuple[int, ...], every_code: bool) -> dict[int, torch.Tensor]:
        """Logit of each next code; only those that exist below the prefix unless `every_code`."""
        model, level = self.model, len(prefix)
        exist = sorted(p[-1] for p in self.numbers if len(p) == level + 1 and p[:-1] == prefix)
        if model.config.head == "per_level":
            logits = model.head.levels[level](state)
            return {code: logits[code] for code in (range(len(logits)) if every_code else exist)}
        query = model.head.query(state)
        out = {}
        for code in exist:
            node = model.head.nodes.table[self.numbers[(*prefix, code)]]
            if model.config.head_similarity == "cosine":
                out[code] = F.cosine_similarity(query, node, 0) / model.config.head_temperature
            else:
                out[code] = query @ node
        return out

    def steps(self, history: list[int], item: int, every_code: bool = False) -> list[tuple[torch.Tensor, int]]:
        """Logits and position of the right code at each level."""
        shift = int(bool(self.model.config.distill_weight) and self.model.config.distill_position == "start")
        states, out = self.states(history, item), []
        for level, prefix in enumerate(self.path(item)):
            logits = self.code_logits(states[level + shift], prefix[:-1], every_code)
            out.append((torch.stack(list(logits.values())), list(logits).index(prefix[-1])))
        return out

    def log_probability(self, history: list[int], item: int) -> float:
        """Sum over the levels of the log of a softmax written out."""
        total = 0.0
        for logits, right in self.steps(history, item):
            weights = logits.double().exp()
            total += float((weights[right] / weights.sum()).log())
        return total

    def dense_logit(self, history: list[int], item: int, behind: int) -> float:
        """Similarity of the distillation token, standing behind (or before) the codes of `behind`, with `item`."""
        model, states = self.model, self.states(history, behind)
        query = model.dis_out(states[0 if model.config.distill_position == "start" else -1])
        own = model.integrated[item]
        if model.config.distill_similarity == "cosine":
            return float(F.cosine_similarity(query, own, 0)) / model.config.distill_temperature
        return float(query @ own)
