"""Which nodes of a partition should lie together in memory: blocks of neighbours, by METIS of pymetis.

A sum over neighbours waits for memory: rows are gathered from all over the table. Nodes that are numbered block by
block find most of their neighbours' rows in the cache. It changes no result, and helps as far as the graph has
communities.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from genrec_dist.graph.dgl_tools import assignment_from_child, child_main
from genrec_dist.graph.interactions import Interactions
from genrec_dist.graph.layout import build_partition, renumber, split_halo

MOST_BLOCKS = 4096


def neighbour_blocks(
    graph: Interactions, assignment: np.ndarray, num_parts: int, block_nodes: int, time_limit: float
) -> np.ndarray | None:
    """Block of every node within its partition; None where no partition is larger than a block.

    Args:
        graph: user-item graph.
        assignment: partition of each node.
        num_parts: partitions.
        block_nodes: about how many nodes a block should have; 0: no blocks.
        time_limit: seconds given to the child process.

    Shapes:
        assignment: (num_nodes,) integers. returns: (num_nodes,) int32.

    Raises:
        ClusterError: pymetis is not usable, or died or took too long.
    """
    largest = int(np.bincount(assignment, minlength=num_parts).max())
    num_blocks = min(MOST_BLOCKS, -(-largest // block_nodes)) if block_nodes else 1
    if num_blocks < 2:
        return None
    extra = {"partition": assignment.astype(np.int32)}
    return assignment_from_child("pymetis", __name__, graph, num_blocks, time_limit, extra=extra)


def _blocks(graph: Interactions, num_blocks: int, seed: int) -> np.ndarray:
    """Body of the child process: every partition's own edges, cut into blocks."""
    import pymetis

    assignment = np.load(Path(sys.argv[1]) / "partition.npy", allow_pickle=False)
    num_parts = int(assignment.max()) + 1
    new_id, offsets = renumber(assignment, num_parts)
    found = np.zeros(graph.num_nodes, np.int32)
    old = np.argsort(new_id)
    dtype = pymetis.zero_copy_dtype()
    for part in range(num_parts):
        partition = build_partition(graph, part, new_id, offsets)
        if partition.num_owned < num_blocks:
            continue
        (indptr, indices), _, _ = split_halo(partition)
        adjacency = pymetis.CSRAdjacency(indptr.astype(dtype), indices.astype(dtype))
        result = pymetis.part_graph(num_blocks, adjacency, recursive=True, options=pymetis.Options(seed=seed))
        found[old[offsets[part] : offsets[part + 1]]] = result.vertex_part
    return found


if __name__ == "__main__":
    child_main(_blocks)
