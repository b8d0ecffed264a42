"""PRORec Stage I model: item table E_C, modality adaption layer, backbone, joint loss. Single device.

Source: PRORec section 3.3, equations 2 to 5.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from genrec_dist.collaborative.backbones import Din, SasRec, TimeEncoding, history_of
from genrec_dist.collaborative.losses import (
    counted,
    full_softmax,
    info_nce,
    sampled_softmax,
    scale_of,
    similarity,
)
from genrec_dist.config import FusionConfig
from genrec_dist.graph.rows import normal_rows
from genrec_dist.training.counter import stream_key

TABLE_STD = 0.02


class AdaLN(nn.Module):
    """Adaptive layer normalisation: LN(z) * (1 + gamma(z)) + beta(z), gamma and beta linear, zero at start.

    Source: Peebles and Xie (2023); PRORec conditions it on its own input.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        gamma, beta = self.modulation(z).chunk(2, -1)
        return self.norm(z) * (1 + gamma) + beta


class ModalityAdaption(nn.Module):
    """E_T = AdaLN(W E_S + b) (equation 2).

    Shapes:
        input: (..., semantic_dim). output: (..., dim).
    """

    def __init__(self, semantic_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(semantic_dim, dim)
        self.norm = AdaLN(dim)

    def forward(self, semantic: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(semantic))


class FusionModel(nn.Module):
    """Sequence model over E_C (+ E_T), trained by L_seq + alpha L_align (equation 5).

    Args:
        config: fusion section.
        semantic: E_S, kept as a constant.
        seed: of the item table, whose rows start as functions of their item alone.
        item_indices: items of the rows, where the model has only some.
        span: first and last time of the train parts, where times are read.

    Shapes:
        semantic: (num_items, semantic_dim) float32.
    """

    semantic: torch.Tensor

    def __init__(
        self,
        config: FusionConfig,
        semantic: torch.Tensor,
        seed: int = 0,
        item_indices: np.ndarray | None = None,
        span: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.config = config
        self.num_items = len(semantic)
        self.register_buffer("semantic", semantic, persistent=False)
        indices = np.arange(self.num_items) if item_indices is None else item_indices
        start = normal_rows(indices, config.dim, TABLE_STD, stream_key(seed, 4))
        self.collaborative = nn.Embedding.from_pretrained(start, freeze=False)
        self.adaption = ModalityAdaption(semantic.shape[1], config.dim)
        if config.backbone == "din":
            self.backbone: nn.Module = Din(
                config.dim,
                config.max_history,
                config.dropout,
                config.attention,
                config.similarity == "cosine",
                config.item_dropout,
            )
        else:
            self.backbone = SasRec(
                config.dim,
                config.max_history,
                config.num_layers,
                config.num_heads,
                config.dropout,
                config.input_norm,
                config.item_dropout,
            )
        if config.time_bumps:
            self.time = TimeEncoding(config.dim, config.time_bumps, span)
        nn.init.xavier_uniform_(self.adaption.linear.weight)

    @property
    def whole_parameters(self) -> list[str]:
        """Parameters that are read outside of their own module's call."""
        return ["collaborative.weight"] + ["backbone.mix"] * isinstance(self.backbone, Din)

    def items(self, indices: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of E_C, of E_T and of what the sequence model reads, for some items or all of them."""
        if indices is None:
            collaborative, semantic = self.collaborative.weight, self.semantic
        else:
            collaborative, semantic = self.collaborative(indices), self.semantic[indices]
        adapted = self.adaption(semantic)
        return collaborative, adapted, self.read_table(collaborative, adapted)

    def read_table(self, collaborative: torch.Tensor, adapted: torch.Tensor) -> torch.Tensor:
        """What the sequence model reads of rows of both tables."""
        return collaborative if self.config.item_input == "collaborative" else collaborative + adapted

    def beside(self, times: torch.Tensor | None = None) -> torch.Tensor | float:
        """What is added to the items of a history, given their times, (B, L, D)."""
        return 0.0 if times is None or not self.config.time_bumps else self.time(times)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Joint loss of a batch.

        Args:
            batch: history, mask and target(s), `times` where they are read; `align_items` distinct items of the global
                batch and `align_anchors` this worker's positions among them (padded on a GPU, `align_size` are real),
                where there is an alignment; `negatives` for the sampled softmax; `count` and `align_count`, the global
                counts over the number of workers.
        """
        config = self.config
        if config.loss == "full_softmax":
            collaborative, adapted, table = self.items()
            seq = self._full_loss(table, batch)
            local = batch.get("align_items")
        else:
            # Only the rows that this batch touches are computed.
            names = [k for k in ("history", "target", "negatives", "align_items") if k in batch]
            needed = torch.cat([batch[k].flatten() for k in names])
            distinct, place = torch.unique(needed, return_inverse=True)
            collaborative, adapted, table = self.items(distinct)
            history, target, negatives, *rest = place.split([batch[k].numel() for k in names])
            local = rest[0] if rest else None
            seq = self._sampled_loss(
                table, history.view_as(batch["history"]), batch["mask"], target, negatives, batch["target"], batch
            )
        if local is None:
            loss = seq / batch["count"]
            return {"loss": loss, "loss_seq": loss}
        align = info_nce(
            collaborative[local[batch["align_anchors"]]],
            adapted[local],
            batch["align_anchors"],
            kind=config.align_similarity,
            temperature=config.align_temperature,
            positive_in_denominator=config.align_positive_in_denominator,
            num_candidates=batch.get("align_size"),
        )
        seq, align = seq / batch["count"], align / batch["align_count"]
        return {"loss": seq + config.align_weight * align, "loss_seq": seq, "loss_align": align}

    def _full_loss(self, table: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        config = self.config
        beside = self.beside(*history_of(batch)[2:])
        scale = scale_of(config.similarity, config.temperature)
        if isinstance(self.backbone, SasRec):
            states = self.backbone.states(table, batch["history"], beside)
            states, targets = counted(states, batch["targets"], batch["mask"])
            return full_softmax(similarity(states, table, config.similarity) * scale, targets, config.label_smoothing)
        logits = self.backbone.scores(table, batch["history"], batch["mask"], table, beside)  # type: ignore[operator]
        return full_softmax(logits * scale, batch["target"], config.label_smoothing)

    def _sampled_loss(self, table, history, mask, target, negatives, target_items, batch) -> torch.Tensor:
        scale = scale_of(self.config.similarity, self.config.temperature)
        candidates = F.embedding(torch.cat([target, negatives]), table)
        beside = self.beside(*history_of(batch)[2:])
        if isinstance(self.backbone, Din):
            scores = self.backbone.scores(table, history, mask, candidates, beside) * scale
        else:
            users = self.backbone.user(table, history, mask, beside)  # type: ignore[operator]
            scores = similarity(users, candidates, self.config.similarity) * scale
        positive = scores.diagonal()  # candidate b is the target of sample b
        hit = batch["negatives"][None, :] == target_items[:, None]
        return sampled_softmax(positive, scores[:, len(target) :], hit, self.num_items - 1)

    @torch.no_grad()
    def score_catalog(
        self,
        history: torch.Tensor,
        mask: torch.Tensor,
        times: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of all items for each history, (B, num_items).

        Args:
            table: what the sequence model reads of all items, the last of `items()`, where it is there already.
        """
        table = self.items()[2] if table is None else table
        beside = self.beside(times)
        if isinstance(self.backbone, Din):
            return self.backbone.scores(table, history, mask, table, beside)
        users = self.backbone.user(table, history, mask, beside)  # type: ignore[operator]
        return similarity(users, table, self.config.similarity)


def integrate(collaborative: torch.Tensor, adapted: torch.Tensor, kind: str) -> torch.Tensor:
    """Integrated embedding of every item.

    Args:
        kind: 'concat' of the two normalised tables, 'sum' of the two raw tables, or 'collaborative' only.

    Shapes:
        both: (N, D). Returns (N, 2 D) or (N, D).
    """
    if kind == "concat":
        return torch.cat([F.normalize(collaborative, dim=-1), F.normalize(adapted, dim=-1)], -1) / 2**0.5
    return collaborative + adapted if kind == "sum" else collaborative
