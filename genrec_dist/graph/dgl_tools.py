"""DGL behind one door: its import, METIS in a child process, and its file format. No other module imports dgl.

DGL is unmaintained and loads native libraries, so it is imported late, only where it is used, and every way it can
fail becomes a ClusterError. METIS can abort or hang: it runs in a child process with a time limit and hands over
.npy files. Reads plain arrays (Interactions, Partition); writes a folder that `dgl.distributed.load_partition` reads.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.errors import ClusterError, DataError, GenrecError
from genrec_dist.graph.interactions import FILES, Interactions
from genrec_dist.graph.layout import Partition

NTYPES = {"user": 0, "item": 1}
ETYPES = {"item:rated_by:user": 0, "user:rates:item": 1}
"""Edge types by the type of their destination: edges into users first, as the rows of a Partition are."""
CONFIG_NAME = "graph.json"
ORPHAN_GRACE = 60
"""Seconds after the time limit at which a child ends itself: its parent, which should have killed it, is gone."""


def load_dgl() -> Any:
    """The `dgl` module.

    Raises:
        ClusterError: DGL is missing, cannot be imported, or is not 1.1 <= version < 2.
    """
    os.environ.setdefault("DGLBACKEND", "pytorch")  # unset, DGL writes a file into the home folder
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import dgl
    except Exception as error:  # of any type: it loads native libraries and meets newer versions of numpy and torch
        got = f"{type(error).__name__}: {error}"
        raise _unusable("DGL cannot be imported", f"{_installed()}{got}") from error
    version = str(getattr(dgl, "__version__", "no version"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not (1, 1) <= (int(numbers[1]), int(numbers[2])) < (2, 0):
        raise _unusable("DGL has a version that was not tried", version)
    return dgl


def dgl_problem() -> GenrecError | None:
    """What `load_dgl` would raise, or None when DGL works."""
    try:
        load_dgl()
    except GenrecError as error:
        return error
    return None


def _installed() -> str:
    try:
        return f"dgl {importlib.metadata.version('dgl')}: "
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unusable(what: str, got: str) -> ClusterError:
    return ClusterError(
        what,
        where="dgl",
        got=got,
        expected="dgl 1.1.x",
        fix="pip install dgl==1.1.3 on Python 3.11 or older; or set graph.partitioner to pymetis or random "
        "and runtime.spmm to torch, which need no DGL",
    )


def metis_assignment(graph: Interactions, num_parts: int, time_limit: float) -> np.ndarray:
    """Partition of every node by DGL's METIS, which ends differently from run to run.

    It balances four numbers at once: users, items, and the edges of each.

    Args:
        graph: user-item graph.
        num_parts: at least 2 (METIS dies at 1).
        time_limit: seconds after which the child process is killed.

    Shapes:
        returns: (num_nodes,) int32, users then items.

    Raises:
        ClusterError: DGL is not usable, or METIS died, took too long or returned nonsense.
    """
    return assignment_from_child("metis", __name__, graph, num_parts, time_limit)


def _metis(graph: Interactions, num_parts: int, seed: int) -> np.ndarray:
    """Body of METIS's child process; `seed` has no effect, DGL offers none."""
    dgl = load_dgl()
    import torch

    num_users, num_nodes = graph.num_users, graph.num_nodes
    source = np.repeat(np.arange(num_nodes), graph.node_degrees())
    target = np.concatenate([graph.user_items.astype(np.int64) + num_users, graph.item_users])
    whole = dgl.graph((torch.from_numpy(source), torch.from_numpy(target)), num_nodes=num_nodes)
    ntypes = torch.from_numpy((np.arange(num_nodes) >= num_users).astype(np.int64))
    assignment = dgl.metis_partition_assignment(whole, num_parts, balance_ntypes=ntypes, balance_edges=True)
    if assignment is None:
        raise child_error("metis", "METIS reported an error", num_nodes, num_parts)
    return assignment.numpy()


def assignment_from_child(
    kind: str,
    module: str,
    graph: Interactions,
    num_parts: int,
    time_limit: float,
    seed: int = 0,
    extra: dict[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Run a partitioner in a process of its own, which may abort or hang without harm to this one.

    Args:
        kind: name of the partitioner, for messages.
        module: module with a main part that calls `child_main`.
        graph: user-item graph; handed over as .npy files in a temporary folder.
        num_parts: partitions.
        time_limit: seconds after which the child is killed.
        seed: passed on.
        extra: arrays that the child finds in its folder as well.

    Shapes:
        returns: (num_nodes,) int32.

    Raises:
        ClusterError: the child died, took too long, or left a result of the wrong shape or range.
    """

    def failed(got: str) -> ClusterError:
        return child_error(kind, got, graph.num_nodes, num_parts, time_limit)

    with tempfile.TemporaryDirectory(prefix="genrec-partition-") as name:
        folder = Path(name)
        try:
            for array, values in ({n: getattr(graph, n) for n in FILES} | (extra or {})).items():
                np.save(folder / f"{array}.npy", values, allow_pickle=False)
        except OSError as error:  # TMPDIR names another place
            raise failed(f"graph could not be written to {folder}: {error}") from error
        command = child_command(module, folder, num_parts, time_limit, seed)
        try:
            # Output goes to a file: nothing is left to wait for when the child is killed.
            with open(folder / "output.txt", "wb") as output:
                code = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_child_environment(),
                    timeout=time_limit,
                ).returncode
        except subprocess.TimeoutExpired as error:
            raise failed(f"killed after {time_limit:g} s without a result") from error
        except OSError as error:
            raise failed(f"process not started: {error}") from error
        if (folder / "error.json").is_file():
            raise ClusterError(**read_json(folder / "error.json"))
        if code != 0:
            how = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
            raise failed(f"{how}{_last_lines(folder / 'output.txt')}")
        try:
            assignment = np.load(folder / "assignment.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise failed(f"no readable result: {error}") from error
    if assignment.shape != (graph.num_nodes,) or not np.issubdtype(assignment.dtype, np.integer):
        raise failed(f"{assignment.dtype} of shape {assignment.shape}")
    if len(assignment) and not 0 <= assignment.min() <= assignment.max() < num_parts:
        raise failed(f"partitions {assignment.min()} to {assignment.max()}")
    return assignment.astype(np.int32)


def child_main(assign: Callable[[Interactions, int, int], np.ndarray]) -> None:
    """Main part of a partitioner's child process: read the graph, call `assign(graph, num_parts, seed)`, write.

    Args:
        assign: returns (num_nodes,) integers.
    """
    folder, num_parts, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # The signal's default action needs no Python code to run: it ends native code as well.
    signal.alarm(int(sys.argv[4]))
    try:
        assignment = assign(Interactions.load(folder), num_parts, seed)
    except ClusterError as error:
        fields = {"what": error.what, "where": error.where, "got": error.got, "expected": error.expected}
        write_json(folder / "error.json", {key: str(value) for key, value in fields.items()} | {"fix": error.fix})
        sys.exit(error.exit_code)
    np.save(folder / "assignment.npy", assignment, allow_pickle=False)


def child_command(module: str, folder: Path, num_parts: int, time_limit: float, seed: int) -> list[str]:
    """Command line of a partitioner's child process."""
    alarm = math.ceil(min(time_limit, 1e9)) + ORPHAN_GRACE
    return [sys.executable, "-m", module, str(folder), str(num_parts), str(seed), str(alarm)]


def child_error(kind: str, got: str, num_nodes: int, num_parts: int, time_limit: float | None = None) -> ClusterError:
    """The error of a partitioner that gave no assignment."""
    others = [name for name in ("pymetis", "metis", "random") if name != kind]
    within = "" if time_limit is None else f" within {time_limit:g} s"
    return ClusterError(
        f"partitioner {kind} gave no assignment",
        where="graph.partitioner",
        got=got,
        expected=f"{num_nodes} nodes assigned to {num_parts} partitions{within}",
        fix=f"set graph.partitioner={others[0]} or {others[1]}",
    )


def _child_environment() -> dict[str, str]:
    """This process's environment, with our package on the path where it is not installed."""
    root = str(Path(__file__).resolve().parents[2])
    if root == sysconfig.get_path("purelib"):  # on PYTHONPATH, site-packages would go before the standard library
        return dict(os.environ)
    path = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_lines(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return ": " + " | ".join(lines[-2:])[-500:] if lines else ""


def write_dgl_partition(folder: Path, partitions: Iterable[Partition], num_parts: int, part_method: str) -> Path:
    """Write partitions in DGL's on-disk format, one in memory at a time.

    The format is that of `dgl.distributed.partition_graph` of DGL 1.1 with reshuffling and one hop of halo nodes, up
    to this: a partition holds the edges it owns, and not the copies of others' edges that lead from its nodes to its
    halo nodes; DGL's pipeline for graphs too large for partition_graph (tools/distpartitioning) does the same. A
    directed edge is owned by the owner of its destination. Edge ids are consecutive by partition, then by edge type,
    then by row of the Partition. Node feature "index" of an owned node is its user or item index.

    Args:
        folder: receives graph.json and part<p>/{graph,node_feat,edge_feat}.dgl.
        partitions: all of them, in order.
        num_parts: how many.
        part_method: name of the partitioner, recorded.

    Returns:
        Path of graph.json, which is written last.

    Raises:
        ClusterError: DGL is not usable.
        DataError: not the partitions 0 .. num_parts - 1 of one graph.
    """
    dgl = load_dgl()
    import torch

    node_map: dict[str, list[list[int]]] = {name: [] for name in NTYPES}
    edge_map: dict[str, list[list[int]]] = {name: [] for name in ETYPES}
    files: dict[str, dict[str, str]] = {}
    num_nodes = num_edges = 0
    for part, partition in enumerate(partitions):
        if (partition.part, partition.num_parts) != (part, num_parts) or partition.offsets[part] != num_nodes:
            raise _out_of_order(f"partition {partition.part} of {partition.num_parts}", f"{part} of {num_parts}")
        users, owned, edges = len(partition.users), partition.num_owned, len(partition.indices)
        user_edges = int(partition.indptr[users])
        target = folder / f"part{part}"
        target.mkdir(parents=True, exist_ok=True)
        dgl.save_graphs(str(target / "graph.dgl"), [_local_graph(dgl, partition, num_edges)])
        # np.array copies: the arrays may be read-only maps of files, which torch does not take without a warning.
        features = {f"{name}/index": np.array(getattr(partition, f"{name}s"), np.int64) for name in NTYPES}
        tensors = {name: torch.from_numpy(value) for name, value in features.items()}
        dgl.data.utils.save_tensors(str(target / "node_feat.dgl"), tensors)
        dgl.data.utils.save_tensors(str(target / "edge_feat.dgl"), {})
        for ranges, first, middle, last in (
            (node_map, num_nodes, num_nodes + users, num_nodes + owned),
            (edge_map, num_edges, num_edges + user_edges, num_edges + edges),
        ):
            for name, span in zip(ranges, ([first, middle], [middle, last]), strict=True):
                ranges[name].append(span)
        files[f"part-{part}"] = {
            "node_feats": f"part{part}/node_feat.dgl",
            "edge_feats": f"part{part}/edge_feat.dgl",
            "part_graph": f"part{part}/graph.dgl",
        }
        num_nodes, num_edges = num_nodes + owned, num_edges + edges
    if len(files) != num_parts:
        raise _out_of_order(f"{len(files)} partitions", num_parts)
    config = {
        "graph_name": "interactions",
        "num_nodes": num_nodes,
        "num_edges": num_edges,
        "part_method": part_method,
        "num_parts": num_parts,
        "halo_hops": 1,
        "node_map": node_map,
        "edge_map": edge_map,
        "ntypes": NTYPES,
        "etypes": ETYPES,
    }
    write_json(folder / CONFIG_NAME, config | files)
    return folder / CONFIG_NAME


def _local_graph(dgl: Any, partition: Partition, first_edge: int) -> Any:
    """A partition as DGLGraph: owned nodes, then halo nodes; an edge from each neighbour of an owned node to it."""
    import torch

    users, owned, part = len(partition.users), partition.num_owned, partition.part
    source = partition.indices.astype(np.int64)
    target = np.repeat(np.arange(owned), partition.degrees)
    user_edges = int(partition.indptr[users])
    first = int(partition.offsets[part])
    num_local = owned + len(partition.halo)
    ntype = np.full(num_local, NTYPES["user"], np.int32)
    ntype[users:owned] = NTYPES["item"]
    ntype[source[:user_edges]] = NTYPES["item"]  # users have neighbours among items only, which tells halo nodes apart
    node_data = {
        dgl.NID: np.concatenate([np.arange(first, first + owned), partition.halo]),
        dgl.NTYPE: ntype,
        "inner_node": (np.arange(num_local) < owned).astype(np.uint8),
        "part_id": np.concatenate(
            [np.full(owned, part), np.searchsorted(partition.offsets, partition.halo, side="right") - 1]
        ),
    }
    edge_data = {
        dgl.EID: first_edge + np.arange(len(source)),
        dgl.ETYPE: (np.arange(len(source)) >= user_edges).astype(np.int32),
        "inner_edge": np.ones(len(source), np.uint8),
    }
    graph = dgl.graph((torch.from_numpy(source), torch.from_numpy(target)), num_nodes=num_local)
    graph.ndata.update({name: torch.from_numpy(value) for name, value in node_data.items()})
    graph.edata.update({name: torch.from_numpy(value) for name, value in edge_data.items()})
    return graph


def _out_of_order(got: object, expected: object) -> DataError:
    return DataError("partitions are not all those of one graph, in order", got=got, expected=expected)


if __name__ == "__main__":
    child_main(_metis)
