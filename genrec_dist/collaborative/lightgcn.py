"""LightGCN over one worker's partition: table of layer-0 embeddings, propagation, BPR and sampled-softmax losses.

The table has one row an owned node and is never whole anywhere; what a batch needs of other workers' rows comes by
`exchange`. With one worker it is plain LightGCN.

Source: He et al. (2020), LightGCN, equations 3, 8 and 15.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from genrec_dist.collaborative.losses import bpr, sampled_softmax, scale_of
from genrec_dist.collaborative.pairs import PairBatch
from genrec_dist.config import LightgcnConfig
from genrec_dist.graph.exchange import RowPlan, exchange, fetch_rows, request_rows, return_values
from genrec_dist.graph.propagation import Propagation
from genrec_dist.graph.rows import normal_rows, owned_nodes
from genrec_dist.graph.sampling import Block, NeighbourSampler, at_seeds, sampled_layers
from genrec_dist.graph.spmm import SpmmKind
from genrec_dist.graph.stage import Partitions
from genrec_dist.training.counter import stream_key
from genrec_dist.training.worker import Worker


@dataclass(frozen=True)
class LocalBatch:
    """A worker's part of a batch, as places among the rows that it asks for.

    Args:
        plan: brings the rows: those of the batch, or those at the end of its sampled neighbourhoods.
        count: pairs of the whole batch over the number of workers.
        blocks: sampled neighbourhoods, from the batch outward.

    Shapes:
        users, positives: (b,) int64 places. negatives: (b, m) int64 places, or (m,) shared by the batch.
        reads: (rows of the batch,) float32, how often the whole loss reads each of them.
        sent_reads: (rows sent,) float32, the same at the owners (full mode).
        odds: (b, m) float32 (sampled softmax). hit: (b, m) bool, the shared negative is the positive.
        root_degrees: (rows of the batch, 1) float64 (sampled mode).
    """

    plan: RowPlan
    count: float
    users: torch.Tensor
    positives: torch.Tensor
    negatives: torch.Tensor
    reads: torch.Tensor
    sent_reads: torch.Tensor | None = None
    odds: torch.Tensor | None = None
    hit: torch.Tensor | None = None
    blocks: list[Block] | None = None
    root_degrees: torch.Tensor | None = None


class LightGCN(nn.Module):
    """One worker's part of LightGCN.

    Args:
        config: lightgcn section.
        partitions: of the graph, one a worker.
        worker: this process.
        seed: of the starting values.
        kind: kernel of the neighbour sums.
        overlap: see `Propagation`.
    """

    def __init__(
        self,
        config: LightgcnConfig,
        partitions: Partitions,
        worker: Worker,
        seed: int,
        kind: SpmmKind = "auto",
        overlap: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.partitions, self.worker = config, partitions, worker
        self.partition = partitions.of_worker(worker.rank, worker.world_size)
        self.nodes = owned_nodes(self.partition)
        values = normal_rows(self.nodes, config.dim, config.init_std, stream_key(seed, 3))
        self.table = nn.Parameter(values.to(worker.device))
        self.item_ids = torch.from_numpy(np.array(partitions.item_ids())).to(worker.device)
        self.propagation = Propagation(self.partition, worker, config.num_layers, kind, overlap)
        self.sampler = NeighbourSampler(self.partition, worker, config.fanouts) if config.mode == "sampled" else None
        degrees = torch.from_numpy(np.array(self.partition.degrees, np.float64)).to(worker.device)
        self.inverse_root = torch.where(degrees > 0, degrees.clamp(min=1).rsqrt(), 0.0)[:, None]

    def sharded_rows(self) -> dict[str, np.ndarray]:
        """Parameters sharded by owner, and the node of each of their rows."""
        return {"table": self.nodes}

    @property
    def is_sparse(self) -> bool:
        """True when gradients hold the rows that a batch touches and no others."""
        return self.config.mode == "sampled"

    def localize(self, batch: PairBatch, key: int) -> LocalBatch:
        """Ask the owners for the rows of a batch. All workers have to call this together.

        Args:
            batch: this worker's pairs.
            key: of the neighbour samples.
        """
        worker, shared = self.worker, batch.negatives.ndim == 1
        first = int(self.partitions.offsets[worker.rank])
        wanted = [first + batch.users, self.item_ids[batch.positives], self.item_ids[batch.negatives.ravel()]]
        rows, place = torch.unique(torch.cat(wanted), return_inverse=True)
        users, positives, negatives = place.split([len(part) for part in wanted])
        # Shared negatives are every worker's: their squares are counted once.
        read = torch.cat([users, positives] if shared and not worker.is_main else [users, positives, negatives])
        reads = torch.bincount(read, minlength=len(rows)).float()
        blocks, outermost = None, rows
        if self.sampler is not None:
            blocks, nodes = self.sampler.blocks(rows.cpu().numpy(), key)
            outermost = torch.from_numpy(nodes).to(worker.device)
        plan = request_rows(outermost, self.partitions.offsets, worker)
        roots = torch.from_numpy(np.sqrt(blocks[0].degrees)[:, None]).to(worker.device) if blocks else None
        return LocalBatch(
            plan=plan,
            count=batch.size / worker.world_size,
            users=users,
            positives=positives,
            negatives=negatives.view(batch.negatives.shape),
            reads=reads,
            sent_reads=return_values(reads, plan, worker) if blocks is None else None,
            odds=None if batch.odds is None else batch.odds.float(),
            hit=batch.negatives[None] == batch.positives[:, None] if shared else None,
            blocks=blocks,
            root_degrees=roots,
        )

    def forward(self, batch: LocalBatch) -> dict[str, torch.Tensor]:
        """Loss of a batch: this worker's share, times the number of workers."""
        if batch.blocks is None:
            rows = fetch_rows(self.propagation(self.table), batch.plan, self.worker)
            assert batch.sent_reads is not None
            reads = batch.sent_reads.new_zeros(len(self.table)).index_add_(0, batch.plan.send_rows, batch.sent_reads)
            squares = torch.linalg.vecdot(self.table, self.table) @ reads.to(self.table.dtype)
        else:
            rows, layer0 = self._sampled(batch, batch.blocks)
            squares = (layer0.square().sum(1) * batch.reads).sum()
        rank = self._rank_loss(rows, batch) / batch.count
        l2 = 0.5 * squares / batch.count
        return {"loss": rank + self.config.l2 * l2, "loss_rank": rank, "loss_l2": l2}

    def _sampled(self, batch: LocalBatch, blocks: list[Block]) -> tuple[torch.Tensor, torch.Tensor]:
        """Propagated and layer-0 rows of the batch from its sampled neighbourhoods."""
        send = batch.plan.send_rows
        own = F.embedding(send, self.table, sparse=True)
        sent = torch.cat([own, self.inverse_root[send].to(own.dtype)], 1)
        received = exchange(sent, batch.plan, self.worker)
        raw, inverse_root = received[:, :-1], received[:, -1:].detach()
        y = raw * inverse_root
        raw = at_seeds(blocks, raw)
        if batch.root_degrees is None:  # no layer
            return raw, raw
        layers = sampled_layers(blocks, y)
        total = raw + sum(layers) * batch.root_degrees.to(raw.dtype)
        return total / (self.config.num_layers + 1), raw

    def _rank_loss(self, rows: torch.Tensor, batch: LocalBatch) -> torch.Tensor:
        config = self.config
        if config.similarity == "cosine":
            rows = F.normalize(rows, dim=-1)
        users = rows.index_select(0, batch.users)
        negatives = rows.index_select(0, batch.negatives.ravel()).view(*batch.negatives.shape, rows.shape[1])
        positive = (users * rows.index_select(0, batch.positives)).sum(-1)
        if config.loss == "bpr":
            return bpr(positive, (users[:, None] * negatives).sum(-1))
        assert batch.hit is not None
        assert batch.odds is not None
        scale = scale_of(config.similarity, config.temperature)
        return sampled_softmax(positive * scale, users @ negatives.T * scale, batch.hit, batch.odds)

    @torch.no_grad()
    def embeddings(self) -> torch.Tensor:
        """Propagated rows of the owned nodes, (n, dim), over the whole neighbourhood in every mode."""
        return self.propagation.apply(self.table.detach())
