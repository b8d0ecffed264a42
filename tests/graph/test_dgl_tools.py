"""DGL's door: import failures, METIS in its child process, and files that DGL itself reads back."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest

from genrec_dist.errors import ClusterError, DataError
from genrec_dist.graph import dgl_tools
from genrec_dist.graph.dgl_tools import dgl_problem, load_dgl, metis_assignment, write_dgl_partition
from genrec_dist.graph.interactions import Interactions
from genrec_dist.graph.layout import load_partition, save_partition
from genrec_dist.testing.graphs import iterate_partitions

ROOT = Path(__file__).resolve().parents[2]
NUM_USERS, NUM_ITEMS = 30, 14


@pytest.fixture(scope="module")
def graph() -> Interactions:
    """Node 29 (a user) and node 43 (an item) have no edge."""
    rng = np.random.default_rng(4)
    users, items = rng.integers(0, NUM_USERS - 1, 90), rng.integers(0, NUM_ITEMS - 1, 90)
    return Interactions.from_pairs(users, items, NUM_USERS, NUM_ITEMS)


def test_real_dgl_loads():
    dgl = load_dgl()
    assert dgl.__version__.startswith("1.1")
    assert dgl.backend.backend_name == "pytorch"
    assert dgl_problem() is None


def test_missing_dgl(monkeypatch):
    monkeypatch.setitem(sys.modules, "dgl", None)
    error = dgl_problem()
    assert isinstance(error, ClusterError)
    assert (error.where, error.expected) == ("dgl", "dgl 1.1.x")
    assert "ModuleNotFoundError" in error.got
    for mend in ("pip install dgl==1.1.3", "graph.partitioner", "runtime.spmm"):
        assert mend in error.fix


@pytest.mark.parametrize(
    "failure",
    [
        "ImportError('no torchdata')",
        "OSError('libcudart.so.11: cannot open')",
        "FileNotFoundError('Cannot find DGL C++ graphbolt library')",
        "RuntimeError('device kernel')",
    ],
)
def test_broken_dgl(failure, tmp_path, monkeypatch):
    (tmp_path / "dgl.py").write_text(f"raise {failure}")
    monkeypatch.delitem(sys.modules, "dgl", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ClusterError, match="DGL cannot be imported") as caught:
        load_dgl()
    kind, text = failure.rstrip(")'").split("('")
    assert caught.value.got == f"dgl 1.1.3: {kind}: {text}"


@pytest.mark.parametrize(
    ("version", "good"),
    [("2.1.0", False), ("1.0.4", False), ("0.9.1", False), ("odd", False), ("1.1.3+cu118", True), ("1.2", True)],
)
def test_version(version, good, monkeypatch):
    fake = ModuleType("dgl")
    fake.__version__ = version
    monkeypatch.setitem(sys.modules, "dgl", fake)
    if good:
        assert load_dgl() is fake
        return
    error = dgl_problem()
    assert isinstance(error, ClusterError)
    assert error.got == version


def test_backend_is_chosen_before_import(tmp_path, monkeypatch):
    (tmp_path / "dgl.py").write_text("import os; __version__ = '1.1.0'; backend = os.environ['DGLBACKEND']")
    monkeypatch.delenv("DGLBACKEND", raising=False)
    real = sys.modules.pop("dgl", None)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert load_dgl().backend == "pytorch"
    finally:
        sys.modules.pop("dgl", None)
        if real is not None:
            sys.modules["dgl"] = real


def test_no_other_module_imports_dgl():
    importers = set()
    for path in [*(ROOT / "genrec_dist").rglob("*.py"), *(ROOT / "launcher").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "dgl" for name in names):
                importers.add(str(path.relative_to(ROOT)))
    assert importers == {"genrec_dist/graph/dgl_tools.py"}


def test_metis_leaves_this_process_without_dgl():
    code = (
        "import sys, numpy as np\n"
        "from genrec_dist.graph.interactions import Interactions\n"
        "from genrec_dist.graph.dgl_tools import metis_assignment\n"
        "graph = Interactions.from_pairs(np.arange(20), np.arange(20) // 10, 20, 2)\n"
        "parts = metis_assignment(graph, 2, 60.0)\n"
        "assert parts.dtype == np.int32 and parts.tolist() in ([0] * 10 + [1] * 10 + [0, 1], "
        "[1] * 10 + [0] * 10 + [1, 0]), parts\n"
        "assert 'dgl' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_metis_is_given_the_whole_graph_and_its_types(monkeypatch):
    import torch

    calls = []

    def assign(whole, num_parts, **options):
        edges = sorted(zip(*(ends.tolist() for ends in whole.edges()), strict=True))
        calls.append((whole.num_nodes(), edges, num_parts, options.pop("balance_ntypes").tolist(), options))
        return torch.tensor([0, 1, 0, 1, 0])

    monkeypatch.setattr(load_dgl(), "metis_partition_assignment", assign)
    small = Interactions.from_pairs([0, 0, 2], [0, 1, 1], 3, 2)
    assert dgl_tools._metis(small, 2, 0).tolist() == [0, 1, 0, 1, 0]
    edges = [(0, 3), (0, 4), (2, 4), (3, 0), (4, 0), (4, 2)]
    assert calls == [(5, edges, 2, [0, 0, 0, 1, 1], {"balance_edges": True})]


def test_metis_that_reports_an_error(monkeypatch, graph):
    monkeypatch.setattr(load_dgl(), "metis_partition_assignment", lambda *a, **k: None)
    with pytest.raises(ClusterError, match="METIS reported an error"):
        dgl_tools._metis(graph, 2, 0)


def test_metis_over_its_time_limit(graph):
    before = set(psutil.Process().children())
    with pytest.raises(ClusterError, match="partitioner metis gave no assignment") as caught:
        metis_assignment(graph, 2, time_limit=0.05)
    assert caught.value.where == "graph.partitioner"
    assert caught.value.got == "killed after 0.05 s without a result"
    assert caught.value.expected == "44 nodes assigned to 2 partitions within 0.05 s"
    assert caught.value.fix == "set graph.partitioner=pymetis or random"
    assert set(psutil.Process().children()) <= before


def child_runs(monkeypatch, code: str, *options: str) -> None:
    """Replace the child's program; it gets the temporary folder as its only argument."""

    def command(module, folder, *rest):
        return [sys.executable, *options, "-c", code, str(folder)]

    monkeypatch.setattr(dgl_tools, "child_command", command)


def test_a_hanging_child_is_killed_and_only_it(graph, monkeypatch, tmp_path):
    note = tmp_path / "pid"
    child_runs(
        monkeypatch,
        "import os, pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(120)",
        "-S",
    )
    bystander = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(120)"])
    try:
        started = time.monotonic()
        with pytest.raises(ClusterError, match="killed after 2 s"):
            metis_assignment(graph, 2, time_limit=2.0)
        assert time.monotonic() - started < 30
        assert not psutil.pid_exists(int(note.read_text()))
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


NO_CORE = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
SAVE = "import sys, numpy as np; np.save(sys.argv[1] + '/assignment.npy', "


@pytest.mark.parametrize(
    ("code", "got"),
    [
        (NO_CORE + "import os; os.abort()", "killed by SIGABRT"),
        ("print('free(): invalid size'); raise SystemExit(3)", "exit code 3: free(): invalid size"),
        ("pass", "no readable result"),
        (SAVE + "np.zeros(43, np.int32))", "int32 of shape (43,)"),
        (SAVE + "np.zeros((44, 1), np.int32))", "int32 of shape (44, 1)"),
        (SAVE + "np.zeros(44))", "float64 of shape (44,)"),
        (SAVE + "np.arange(44) % 2 - 1)", "partitions -1 to 0"),
        (SAVE + "np.full(44, 2))", "partitions 2 to 2"),
        (SAVE + "np.array([{}] * 44), allow_pickle=True)", "no readable result: Object arrays cannot be loaded"),
    ],
)
def test_a_child_that_fails(code, got, graph, monkeypatch):
    child_runs(monkeypatch, code)
    with pytest.raises(ClusterError, match="partitioner metis gave no assignment") as caught:
        metis_assignment(graph, 2, 60.0)
    assert caught.value.got.startswith(got)
    assert caught.value.fix == "set graph.partitioner=pymetis or random"


def test_a_child_that_cannot_start(graph, monkeypatch):
    monkeypatch.setattr(dgl_tools, "child_command", lambda *arguments: ["/nowhere/python"])
    with pytest.raises(ClusterError, match="process not started"):
        metis_assignment(graph, 2, 60.0)


def test_a_child_finds_the_package_where_it_is_not_installed(graph, monkeypatch, tmp_path):
    """With -S there are no site-packages and no editable install: the path must come from the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    child_runs(monkeypatch, "import sys, genrec_dist; assert '/somewhere/else' in sys.path", "-S")
    with pytest.raises(ClusterError, match="no readable result"):
        metis_assignment(graph, 2, 60.0)


def test_the_child_says_what_is_wrong_with_dgl(graph, monkeypatch, tmp_path):
    (tmp_path / "dgl.py").write_text("__version__ = '2.1.0'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ClusterError, match="version that was not tried") as caught:
        metis_assignment(graph, 2, 60.0)
    assert (caught.value.where, caught.value.got) == ("dgl", "2.1.0")


def test_an_orphan_ends_itself(tmp_path, graph):
    """A child whose parent is gone runs into its own alarm, even inside native code."""
    for name in dgl_tools.FILES:
        np.save(tmp_path / f"{name}.npy", getattr(graph, name))
    code = "import time; from genrec_dist.graph.dgl_tools import child_main; child_main(lambda *a: time.sleep(60))"
    command = [sys.executable, "-c", code, str(tmp_path), "2", "0", "1"]
    assert subprocess.run(command, cwd=ROOT, timeout=40).returncode == -signal.SIGALRM
    regular = dgl_tools.child_command("m", tmp_path, 2, float("inf"), 0)
    assert 0 < int(regular[-1]) < 2**31


ASSIGNMENTS = {
    "one": (1, lambda: np.zeros(44, int)),
    "two": (2, lambda: np.random.default_rng(0).integers(0, 2, 44)),
    "four": (4, lambda: np.random.default_rng(0).integers(0, 4, 44)),
    "first is empty": (3, lambda: np.random.default_rng(0).integers(1, 3, 44)),
    "middle is empty": (3, lambda: np.random.default_rng(0).choice([0, 2], 44)),
    "last two are empty": (4, lambda: np.random.default_rng(0).integers(0, 2, 44)),
    "users here, items there": (2, lambda: (np.arange(44) >= NUM_USERS).astype(int)),
}


def directed_edges(graph: Interactions) -> set[tuple[int, int]]:
    """(source, destination) node ids, both ways, by loops."""
    edges = set()
    for user in range(NUM_USERS):
        for item in graph.user_items[graph.user_indptr[user] : graph.user_indptr[user + 1]]:
            edges |= {(user, NUM_USERS + int(item)), (NUM_USERS + int(item), user)}
    return edges


@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_dgl_reads_what_was_written(case, graph, tmp_path, monkeypatch):
    num_parts, make = ASSIGNMENTS[case]
    assignment = make()
    dgl = load_dgl()
    import torch

    monkeypatch.setenv("DGL_DIST_DEBUG", "1")  # load_partition checks book and graph against each other
    old_ids = np.argsort(assignment, kind="stable")  # by new id
    offsets = np.searchsorted(assignment[old_ids], np.arange(num_parts + 1))
    for partition in iterate_partitions(graph, assignment, num_parts):
        save_partition(tmp_path, partition)
    mapped = (load_partition(tmp_path, part, NUM_USERS, NUM_ITEMS, offsets) for part in range(num_parts))
    path = write_dgl_partition(tmp_path / "dgl", mapped, num_parts, "random")
    assert path == tmp_path / "dgl" / "graph.json"
    assert dgl_tools.read_json(path)["part_method"] == "random"
    edges, seen_edges, seen_ids = directed_edges(graph), set(), []
    for part in range(num_parts):
        local, node_features, edge_features, book, name, ntypes, etypes = dgl.distributed.load_partition(
            str(path), part
        )
        assert (name, ntypes) == ("interactions", ["user", "item"])
        assert [tuple(etype) if isinstance(etype, tuple) else etype for etype in etypes] == [
            ("item", "rated_by", "user"),
            ("user", "rates", "item"),
        ]
        assert edge_features == {}
        nodes = old_ids[local.ndata[dgl.NID].numpy()]
        inner = local.ndata["inner_node"].numpy().astype(bool)
        own = np.flatnonzero(assignment == part)
        assert nodes[: len(own)].tolist() == own.tolist()
        assert inner.tolist() == [True] * len(own) + [False] * (len(nodes) - len(own))
        assert local.ndata["part_id"].tolist() == assignment[nodes].tolist()
        assert local.ndata[dgl.NTYPE].tolist() == (nodes >= NUM_USERS).tolist()
        mine = {(source, target) for source, target in edges if assignment[target] == part}
        assert set(nodes[len(own) :]) == {source for source, _ in mine} - set(own)
        assert node_features["user/index"].tolist() == own[own < NUM_USERS].tolist()
        assert node_features["item/index"].tolist() == (own[own >= NUM_USERS] - NUM_USERS).tolist()

        source, target = (nodes[ends.numpy()] for ends in local.edges())
        found = list(zip(source.tolist(), target.tolist(), strict=True))
        assert set(found) == mine
        assert len(found) == len(mine)
        assert local.edata["inner_edge"].tolist() == [1] * len(found)
        assert local.edata[dgl.ETYPE].tolist() == (target >= NUM_USERS).tolist()
        ids = local.edata[dgl.EID]
        if len(found):
            assert book.eid2partid(ids).tolist() == [part] * len(found)
            assert book.map_to_per_etype(ids)[0].tolist() == local.edata[dgl.ETYPE].tolist()
        seen_edges |= mine
        seen_ids += ids.tolist()

        every = torch.arange(44)
        assert book.num_partitions() == num_parts
        assert book.nid2partid(every).tolist() == assignment[old_ids].tolist()
        types, typed = book.map_to_per_ntype(every)
        assert types.tolist() == (old_ids >= NUM_USERS).tolist()
        for number, ntype in enumerate(ntypes):
            of_type = old_ids[types.numpy() == number]
            assert typed[types == number].tolist() == list(range(len(of_type)))
            assert book.nid2partid(torch.arange(len(of_type)), ntype).tolist() == assignment[of_type].tolist()
        assert [entry["num_nodes"] for entry in book.metadata()] == np.diff(offsets).tolist()
    assert seen_edges == edges
    assert seen_ids == list(range(len(edges)))


def originals(dgl, path: Path, part: int, index: dict) -> dict:
    """What a written partition says, in ids that do not depend on the order of types."""
    local, _, _, book, _, ntypes, etypes = dgl.distributed.load_partition(str(path), part)
    types, typed = book.map_to_per_ntype(local.ndata[dgl.NID])
    nodes = [(ntypes[t], int(index[ntypes[t]][i])) for t, i in zip(types.tolist(), typed.tolist(), strict=True)]
    inner = local.ndata["inner_node"].tolist()
    source, target = local.edges()
    owned = local.edata["inner_edge"].tolist()
    return {
        "owned": {node for node, flag in zip(nodes, inner, strict=True) if flag},
        "halo": {node for node, flag in zip(nodes, inner, strict=True) if not flag},
        "edges": {
            (nodes[s], etypes[kind], nodes[t])
            for s, t, kind, flag in zip(
                source.tolist(), target.tolist(), local.edata[dgl.ETYPE].tolist(), owned, strict=True
            )
            if flag
        },
        "types": {name: value.dtype for data in (local.ndata, local.edata) for name, value in data.items()},
        "owners": [(node, owner) for node, owner in sorted(zip(nodes, local.ndata["part_id"].tolist(), strict=True))],
    }


@pytest.mark.filterwarnings("ignore")  # of DGL's partition_graph, which we do not use
def test_agrees_with_dgls_own_partition_graph(graph, tmp_path, monkeypatch):
    dgl = load_dgl()
    import torch

    assignment = np.random.default_rng(1).integers(0, 3, 44)
    users = torch.from_numpy(np.repeat(np.arange(NUM_USERS), np.diff(graph.user_indptr)))
    items = torch.from_numpy(graph.user_items.astype(np.int64))
    whole = dgl.heterograph(
        {("item", "rated_by", "user"): (items, users), ("user", "rates", "item"): (users, items)},
        num_nodes_dict={"user": NUM_USERS, "item": NUM_ITEMS},
    )
    # DGL orders types by name: items first.
    by_dgl = torch.from_numpy(np.concatenate([assignment[NUM_USERS:], assignment[:NUM_USERS]]))
    monkeypatch.setattr(dgl.distributed.partition, "metis_partition_assignment", lambda *a, **k: by_dgl)
    index, _ = dgl.distributed.partition_graph(
        whole, "theirs", 3, str(tmp_path / "theirs"), num_hops=1, return_mapping=True
    )
    path = write_dgl_partition(tmp_path, iterate_partitions(graph, assignment, 3), 3, "metis")
    order = np.argsort(assignment, kind="stable")
    ours = {"user": order[order < NUM_USERS], "item": order[order >= NUM_USERS] - NUM_USERS}
    for part in range(3):
        expected = originals(dgl, tmp_path / "theirs" / "theirs.json", part, index)
        assert originals(dgl, path, part, ours) == expected
        assert expected["edges"]
        assert expected["halo"]
    theirs, mine = (dgl_tools.read_json(p) for p in (tmp_path / "theirs" / "theirs.json", path))
    assert mine.keys() == theirs.keys()
    for key in ("num_nodes", "num_edges", "num_parts", "part_method", "halo_hops", "part-1", "etypes"):
        assert mine[key] == theirs[key]


def test_partitions_must_be_whole_and_in_order(graph, tmp_path):
    partitions = list(iterate_partitions(graph, np.arange(44) % 3, 3))
    others = list(iterate_partitions(graph, np.repeat([0, 1, 2], [20, 14, 10]), 3))
    for some in (partitions[:2], partitions[::-1], [], [partitions[0], *others[1:]]):
        with pytest.raises(DataError, match="in order"):
            write_dgl_partition(tmp_path, some, 3, "random")
        assert not os.path.exists(tmp_path / "graph.json")
