"""Graph stages: the user-item graph of a catalog's training interactions, and its partitions.

`graph` writes the arrays of interactions.py, targets.npy (num_users, 2) int32 (validation and test item, -1 without)
and report.json. `partitions` writes assignment.npy, new_id.npy, meta.json, report.json, part-<p>/ (layout.py) and,
where DGL works, the same in DGL's own format in dgl/. How a graph is partitioned changes no result, so the partitions
are a placement: in no key but their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.catalog.dataset import Catalog
from genrec_dist.config import Config
from genrec_dist.errors import ArtifactError, ClusterError
from genrec_dist.graph.dgl_tools import dgl_problem, write_dgl_partition
from genrec_dist.graph.interactions import Interactions, write_interactions
from genrec_dist.graph.layout import Partition, build_partition, load_partition, renumber, save_partition
from genrec_dist.graph.locality import neighbour_blocks
from genrec_dist.graph.partitioners import assign_nodes, assignment_hash, partition_report
from genrec_dist.pipeline import Stage, StageContext

TARGETS = "targets.npy"


def graph_stage(config: Config, catalog: Stage) -> Stage:
    """Stage that writes the user-item graph; it depends on the order, which decides what is held out."""
    settings = {"order": config.catalog.order}
    return Stage("graph", 1, settings, {"catalog": catalog}, lambda context: build_graph(context, settings))


def partition_stage(config: Config, graph: Stage) -> Stage:
    """Stage that shares the graph out, one partition a worker."""
    settings = config.graph.model_dump(mode="json") | {"num_parts": config.runtime.num_workers}
    return Stage("partitions", 1, settings, {"graph": graph}, lambda context: build_partitions(context, settings))


def build_graph(context: StageContext, settings: dict) -> None:
    """Write interactions, held-out items and counts."""
    catalog = Catalog(context.inputs["catalog"], settings["order"])
    report = write_interactions(catalog, context.out)
    targets = np.lib.format.open_memmap(context.out / TARGETS, "w+", np.int32, (report["users"], 2))
    first = 0
    for sequences in catalog.iterate_sequences():
        part = targets[first : first + sequences.num_users]
        for column, position in enumerate(sequences.split_ends()[1:]):
            part[:, column] = np.where(position >= 0, sequences.items[np.maximum(position, 0)], -1)
        first += sequences.num_users
    targets.flush()
    write_json(context.out / "report.json", report)


def build_partitions(context: StageContext, settings: dict) -> None:
    """Assign every node to a part and write the parts."""
    graph = Interactions.load(context.inputs["graph"])
    num_parts, kind = settings["num_parts"], settings["partitioner"]
    limit = 60 * context.runtime.partition_minutes
    assignment = assign_nodes(kind, graph, num_parts, settings["seed"], limit)
    blocks = None
    try:
        blocks = neighbour_blocks(graph, assignment, num_parts, settings["block_nodes"], limit)
    except ClusterError as error:  # a matter of speed alone
        context.event("without_blocks", detail=str(error))
    parts = write_partitions(context.out, graph, assignment, num_parts, kind, blocks)
    problem = dgl_problem() if settings["dgl_format"] else None
    if settings["dgl_format"] and problem is None:
        write_dgl_partition(context.out / "dgl", parts, num_parts, kind)
    elif problem is not None:
        context.event("without_dgl_format", detail=str(problem))
    write_json(
        context.out / "report.json",
        read_json(context.out / "meta.json")
        | partition_report(graph, assignment, num_parts, parts)
        | {"dgl_format": bool(settings["dgl_format"] and problem is None)},
    )


def write_partitions(
    out: Path,
    graph: Interactions,
    assignment: np.ndarray,
    num_parts: int,
    partitioner: str,
    blocks: np.ndarray | None = None,
) -> Partitions:
    """Write the assignment and the plain arrays of every part, one part in memory at a time.

    Shapes:
        assignment: (num_nodes,) integers, part of each node: users, then items. blocks: likewise, see `renumber`.
    """
    new_id, offsets = renumber(assignment, num_parts, graph.num_users, blocks)
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "assignment.npy", assignment.astype("<i4"), allow_pickle=False)
    np.save(out / "new_id.npy", new_id, allow_pickle=False)
    for part in range(num_parts):
        save_partition(out, build_partition(graph, part, new_id, offsets))
    meta = {
        "num_parts": num_parts,
        "num_users": graph.num_users,
        "num_items": graph.num_items,
        "partitioner": partitioner,
        "offsets": offsets.tolist(),
        "assignment_sha256": assignment_hash(assignment),
        "num_blocks": 0 if blocks is None else int(blocks.max()) + 1,
    }
    write_json(out / "meta.json", meta)
    return Partitions(out)


@dataclass
class Partitions:
    """Reader of a partitions artifact; iterating gives one partition after the other.

    Args:
        folder: the artifact.
    """

    folder: Path

    def __post_init__(self) -> None:
        meta = read_json(self.folder / "meta.json")
        self.num_parts: int = meta["num_parts"]
        self.num_users: int = meta["num_users"]
        self.num_items: int = meta["num_items"]
        self.offsets = np.array(meta["offsets"], np.int64)
        self.new_id = np.load(self.folder / "new_id.npy", mmap_mode="r", allow_pickle=False)
        if len(self.new_id) != self.num_users + self.num_items or self.offsets[-1] != len(self.new_id):
            raise ArtifactError(
                "partitions do not cover the graph",
                where=self.folder,
                got=f"{len(self.new_id)} nodes, parts for {self.offsets[-1]}",
                expected=f"{self.num_users + self.num_items} nodes",
                fix="remove the folder and run the same command again",
            )

    def __getitem__(self, part: int) -> Partition:
        return load_partition(self.folder, part, self.num_users, self.num_items, self.offsets)

    def __iter__(self):
        return (self[part] for part in range(self.num_parts))

    def of_worker(self, rank: int, world_size: int) -> Partition:
        """The partition that a worker owns.

        Raises:
            ClusterError: there are not as many workers as partitions.
        """
        if world_size != self.num_parts:
            raise ClusterError(
                "workers and partitions differ in number",
                where="runtime.num_workers",
                got=f"{world_size} workers",
                expected=f"{self.num_parts}, as the graph was partitioned",
                fix="start the run with the number of workers that you want; the graph is partitioned for it",
            )
        return self[rank]

    def user_ids(self) -> np.ndarray:
        """New id of every user, mapped into memory."""
        return self.new_id[: self.num_users]

    def item_ids(self) -> np.ndarray:
        """New id of every item, mapped into memory."""
        return self.new_id[self.num_users :]
