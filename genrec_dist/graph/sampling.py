"""Neighbour sampling over partitions: the owner of a node draws its neighbours, whoever asks.

With y = D^-1/2 h, a layer of LightGCN is the mean over the neighbours' y, so the mean over a sample of them is an
unbiased estimate, and no weights travel. A node with at most `fanout` neighbours gets all of them: large enough
fan-outs give the full propagation. What is drawn is a function of the node, the layer and the key, not of the workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from genrec_dist.graph.exchange import RowPlan, exchange, exchange_counts, request_rows
from genrec_dist.graph.layout import Partition
from genrec_dist.graph.rows import owned_nodes
from genrec_dist.training.counter import stream_key, uniforms
from genrec_dist.training.worker import Worker


@dataclass(frozen=True)
class Block:
    """One layer's edges, from the nodes below to the nodes above; every node above is also one below.

    Shapes:
        nodes: (n,) int64 new ids above, ascending. degrees: (n,) int64, in the whole graph.
        source: (e,) int64 place among the nodes below. target: (e,) int64 place among `nodes`.
        counts: (n,) int64 edges of each node. itself: (n,) int64 place of each node among the nodes below.
    """

    nodes: np.ndarray
    degrees: np.ndarray
    source: torch.Tensor
    target: torch.Tensor
    counts: torch.Tensor
    itself: torch.Tensor


class NeighbourSampler:
    """Draws blocks for a worker; serves the others' questions at the same time.

    Args:
        partition: what this worker owns.
        worker: this process.
        fanouts: most neighbours of a node, from the seeds outward; one entry a layer.
    """

    def __init__(self, partition: Partition, worker: Worker, fanouts: list[int]) -> None:
        self.partition, self.worker, self.fanouts = partition, worker, fanouts
        first = int(partition.offsets[partition.part])
        own = first + np.arange(partition.num_owned)
        self._new_id = np.concatenate([own, partition.halo])
        self._node = owned_nodes(partition)

    def blocks(self, seeds: np.ndarray, key: int) -> tuple[list[Block], np.ndarray]:
        """Blocks from the seeds outward, and the new ids of the outermost nodes, ascending.

        All workers have to call this together.

        Shapes:
            seeds: (n,) int64 new ids, ascending, without repeats.
        """
        blocks, nodes = [], seeds
        for layer, fanout in enumerate(self.fanouts):
            counts, degrees, neighbours = self._ask(nodes, fanout, stream_key(key, layer))
            below, place = np.unique(np.concatenate([nodes, neighbours]), return_inverse=True)
            device = self.worker.device
            blocks.append(
                Block(
                    nodes,
                    degrees,
                    torch.from_numpy(place[len(nodes) :]).to(device),
                    torch.from_numpy(np.repeat(np.arange(len(nodes)), counts)).to(device),
                    torch.from_numpy(counts).to(device),
                    torch.from_numpy(place[: len(nodes)]).to(device),
                )
            )
            nodes = below
        return blocks, nodes

    def _ask(self, nodes: np.ndarray, fanout: int, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of drawn neighbours, degree, and drawn neighbours of each node, from the nodes' owners."""
        plan = request_rows(nodes, self.partition.offsets, self.worker)
        rows = plan.send_rows.cpu().numpy()
        counts, drawn = self._draw(rows, fanout, key)
        degrees = self.partition.degrees[rows]
        if self.worker.world_size == 1:
            return counts, degrees, drawn
        facts = torch.from_numpy(np.stack([counts, degrees], 1)).to(self.worker.device)
        facts_back = exchange(facts, plan, self.worker).cpu().numpy()
        ends = np.cumsum(plan.send_counts)
        sent = np.diff(np.concatenate([[0], np.cumsum(counts)])[np.concatenate([[0], ends])]).tolist()
        ragged = RowPlan(torch.empty(0), sent, exchange_counts(sent, self.worker))
        neighbours = exchange(torch.from_numpy(drawn).to(self.worker.device), ragged, self.worker)
        return facts_back[:, 0], facts_back[:, 1], neighbours.cpu().numpy()

    def _draw(self, rows: np.ndarray, fanout: int, key: int) -> tuple[np.ndarray, np.ndarray]:
        """Systematic sample without repeats: evenly spaced places from a random start, each equally likely."""
        indptr, degrees = self.partition.indptr, self.partition.degrees[rows]
        counts = np.minimum(degrees, fanout)
        slot = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        degree, count = np.repeat(degrees, counts), np.repeat(counts, counts)
        start = np.repeat(uniforms(self._node[rows], key), counts) * degree
        place = np.minimum((start + slot * (degree / np.maximum(count, 1))) % np.maximum(degree, 1), degree - 1)
        place = np.where(degree <= fanout, slot, place.astype(np.int64))
        columns = np.asarray(self.partition.indices[np.repeat(indptr[rows], counts) + place])
        return counts, self._new_id[columns]


def sampled_layers(blocks: list[Block], y: torch.Tensor) -> list[torch.Tensor]:
    """y of the seeds after 1, ..., K layers.

    Args:
        blocks: from the seeds outward.
        y: D^-1/2 times the layer-0 rows of the outermost nodes.

    Shapes:
        y: (outermost nodes, dim). returns: K of (seeds, dim).
    """
    results = []
    for inner in reversed(range(len(blocks))):
        y = mean_over(blocks[inner], y)
        results.append(at_seeds(blocks[:inner], y))
    return results


def at_seeds(blocks: list[Block], z: torch.Tensor) -> torch.Tensor:
    """Rows of the seeds among the rows of the nodes below the last block."""
    for block in reversed(blocks):
        z = z.index_select(0, block.itself)
    return z


def mean_over(block: Block, below: torch.Tensor) -> torch.Tensor:
    """Mean of the drawn neighbours; zero for a node without any."""
    total = below.new_zeros(len(block.nodes), below.shape[1])
    total = total.index_add(0, block.target, below.index_select(0, block.source))
    return total / block.counts.clamp(min=1)[:, None].to(below.dtype)
