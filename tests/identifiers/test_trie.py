"""The trie beside one made of dicts: numbering, look-up, its file whole and damaged, and the buffers of the heads."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from genrec_dist.errors import ArtifactError, DataError
from genrec_dist.generator.heads import DeviceTrie
from genrec_dist.identifiers import trie as trie_module
from genrec_dist.identifiers.trie import FILE, Trie, build_trie
from genrec_dist.testing.tiny import tiny_trie

STORED = [f.name for f in fields(Trie)]
DERIVED = ["num_children", "level", "item_path", "dense"]
Sequence = tuple[int, ...]


def table(own: list[Sequence], width: int | None = None) -> np.ndarray:
    out = np.full((len(own), width or max(map(len, own))), -1, np.int32)
    for row, path in zip(out, own):
        row[: len(path)] = path
    return out


def trie_of(own: list[Sequence]) -> Trie:
    return build_trie(table(own), np.array([len(p) for p in own], np.int32))


@st.composite
def prefix_free(draw) -> list[Sequence]:
    """Sequences of different lengths in any order, none of which begins another."""
    codes = st.integers(0, draw(st.sampled_from([0, 1, 3, 200, 40_000])))
    drawn = draw(st.sets(st.lists(codes, min_size=1, max_size=5).map(tuple), min_size=1, max_size=25))
    own = [p for p in drawn if not any(p != q and q[: len(p)] == p for q in drawn)]
    return draw(st.permutations(own))


def dict_trie(own: list[Sequence]) -> dict:
    """Nested dicts; a leaf holds its item."""
    root: dict = {}
    for item, path in enumerate(own):
        node = root
        for code in path[:-1]:
            node = node.setdefault(code, {})
        node[path[-1]] = item
    return root


def check_trie(trie: Trie, own: list[Sequence]) -> None:
    """Walk the arrays and the dicts side by side, breadth first."""
    level, number = [(0, dict_trie(own), -1, -1)], 0
    depth = 0
    while level:
        below = []
        assert trie.level_start[depth] == number
        for node, branch, parent, code in level:
            assert node == number
            assert (trie.parent[node], trie.code[node], trie.level[node]) == (parent, code, depth)
            number += 1
            first, stop = int(trie.first_child[node]), int(trie.first_child[node + 1])
            children = {} if isinstance(branch, int) else branch
            assert trie.node_item[node] == (branch if isinstance(branch, int) else -1)
            assert trie.num_children[node] == stop - first == len(children)
            below += [(first + i, branch[c], node, c) for i, c in enumerate(sorted(children))]
        assert trie.max_children(depth) == max(int(trie.num_children[n]) for n, *_ in level)
        level, depth = below, depth + 1
    assert number == trie.num_nodes == trie.first_child[-1] == trie.level_start[depth]
    assert (trie.num_items, trie.max_depth) == (len(own), depth - 1)
    assert trie.num_codes == 1 + max(max(path) for path in own)
    for item, path in enumerate(own):
        nodes = trie.item_path[item]
        assert trie.code[nodes[: len(path)]].tolist() == list(path)
        assert (nodes[len(path) - 1 :] == nodes[len(path) - 1]).all()
        assert trie.node_item[nodes[-1]] == item
        assert trie.leaf[item] == nodes[-1]
        assert trie.depth[item] == len(path)


@settings(max_examples=120, deadline=None)
@given(prefix_free())
@example([(0, 1) * 60, (1,), (0, 0)])  # more levels than one sorting pass holds
def test_trie_against_dicts(own):
    trie = trie_of(own)
    assert np.array_equal(trie.codes, table(own))
    check_trie(trie, own)


def test_children_are_ranges_sorted_by_code():
    trie = build_trie(np.array([[2, 1], [0, 7], [2, 0], [0, 3]], np.int32), np.full(4, 2, np.int32))
    assert trie.code.tolist() == [-1, 0, 2, 3, 7, 0, 1]
    assert trie.parent.tolist() == [-1, 0, 0, 1, 1, 2, 2]
    assert trie.first_child.tolist() == [1, 3, 5, 7, 7, 7, 7, 7]
    assert trie.num_children.tolist() == [2, 2, 2, 0, 0, 0, 0]
    assert trie.level_start.tolist() == [0, 1, 3, 7]
    assert trie.node_item.tolist() == [-1, -1, -1, 3, 1, 2, 0]
    assert trie.leaf.tolist() == [6, 4, 5, 3]
    assert trie.item_path.tolist() == [[2, 6], [1, 4], [2, 5], [1, 3]]
    assert {getattr(trie, name).dtype for name in DERIVED} == {np.dtype(np.int32)}


def test_a_leaf_above_others_has_no_children():
    trie = trie_of([(1,), (0, 0), (2, 5), (2, 4)])
    assert trie.first_child.tolist() == [1, 4, 5, 5, 7, 7, 7, 7]
    assert trie.item_path.tolist() == [[2, 2], [1, 4], [3, 6], [3, 5]]
    assert [trie.max_children(level) for level in range(3)] == [3, 2, 0]


@pytest.mark.parametrize(
    ("codes", "depth", "shared"),
    [
        ([[0, 1], [1, 0], [0, 1]], [2, 2, 2], [0, 2]),  # two items, one code
        ([[1, 1], [0, -1], [0, 1]], [2, 1, 2], [1]),  # an item's code begins another's
        ([[0, -1], [0, 2], [0, -1], [0, 1]], [1, 2, 1, 2], [0, 2]),  # both
        ([[0, 5], [0, 1]], [1, 1], [0, 1]),  # equal up to their depth
    ],
)
def test_codes_that_are_not_one_leaf_an_item_are_refused(codes, depth, shared):
    with pytest.raises(DataError, match="not unique") as caught:
        build_trie(np.array(codes, np.int32), np.array(depth, np.int32))
    assert caught.value.got == f"{len(shared)} items, first: {shared}"


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=2, max_size=12))
def test_exactly_the_items_without_a_leaf_of_their_own_are_refused(own):
    shared = [i for i, p in enumerate(own) if any(i != j and q[: len(p)] == p for j, q in enumerate(own))]
    if not shared:
        assert (trie_of(own).find(table(own)) == np.arange(len(own))).all()
        return
    with pytest.raises(DataError, match="prefix") as caught:
        trie_of(own)
    assert caught.value.got == f"{len(shared)} items, first: {shared[:5]}"


@pytest.mark.parametrize(
    ("codes", "depth", "message"),
    [
        ([[0, 1]], [0], "lengths are out of range"),
        ([[0, 1]], [3], "lengths are out of range"),
        ([[0] * 256], [256], "lengths are out of range"),
        ([[0, -1]], [2], "codes are out of range"),
        ([[0, 1 << 31]], [2], "codes are out of range"),
    ],
)
def test_codes_and_depths_out_of_range_are_refused(codes, depth, message):
    with pytest.raises(DataError, match=message):
        build_trie(np.array(codes, np.int64), np.array(depth, np.int64))


def test_more_nodes_than_numbers_are_refused(monkeypatch):
    codes, depth = np.array([[0, 0], [1, 0]], np.int32), np.array([2, 2], np.int32)
    monkeypatch.setattr(trie_module, "MAX_NODES", 5)
    assert build_trie(codes, depth).num_nodes == 5
    monkeypatch.setattr(trie_module, "MAX_NODES", 4)
    with pytest.raises(DataError, match="too many nodes") as caught:
        build_trie(codes, depth)
    assert caught.value.got == 5


def test_entries_past_the_depth_are_ignored():
    depth = np.array([1, 2, 2], np.int32)
    first = build_trie(np.array([[0, -1], [1, 0], [1, 1]], np.int32), depth)
    second = build_trie(np.array([[0, 70_000], [1, 0], [1, 1]], np.int32), depth)
    for name in STORED + DERIVED:
        assert np.array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype


def test_the_callers_codes_are_left_alone():
    codes, depth = np.array([[0, 7], [1, 0]], np.int16), np.array([1, 2], np.uint8)
    build_trie(codes, depth)
    assert codes.tolist() == [[0, 7], [1, 0]]


@settings(max_examples=120, deadline=None)
@given(prefix_free(), st.data())
def test_find_gives_the_item_of_exactly_the_items_codes(own, data):
    trie, width = trie_of(own), max(map(len, own))
    assert trie_of(own).find(trie.codes).tolist() == list(range(len(own)))
    near = st.sampled_from(own).flatmap(lambda path: st.integers(0, len(path)).map(lambda n: path[:n]))
    code = st.integers(0, trie.num_codes + 1)
    asked = data.draw(
        st.lists(st.tuples(near, st.lists(code, max_size=2)).map(lambda p: (*p[0], *p[1])[:width]), max_size=20)
    )
    known = {path: item for item, path in enumerate(own)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie_module, "DENSE_ENTRIES", data.draw(st.sampled_from([1, 10, 1000, 1 << 20])))
        assert trie.find(table(asked, width)).tolist() == [known.get(path, -1) for path in asked]


@pytest.mark.parametrize("entries", [1, 3, 9, 27, 1 << 20])
def test_find_and_its_dense_levels(entries, monkeypatch):
    """Items above, at and below the last dense level."""
    monkeypatch.setattr(trie_module, "DENSE_ENTRIES", entries)
    own = [(1,), (0, 2), (2, 0, 0), (2, 0, 1), (0, 1, 2, 0), (0, 1, 2, 2)]
    trie = trie_of(own)
    levels = {1: 0, 3: 1, 9: 2, 27: 3}.get(entries, 4)
    assert (trie.dense_levels, trie.dense.shape) == (levels, (3**levels,))
    prefixes = {tuple(row[:levels].tolist()): path[levels - 1] for row, path in zip(trie.codes, trie.item_path)}
    for number, node in enumerate(trie.dense.tolist()):
        prefix = tuple(number // 3 ** (levels - 1 - level) % 3 for level in range(levels))
        assert node == (prefixes.get(prefix, -1) if levels else 0)
    assert trie.find(trie.codes).tolist() == list(range(6))
    absent = [(), (0,), (1, 0), (2, 0), (2, 1, 0), (0, 1, 2), (0, 1, 2, 1), (0, 2, 0, 0), (2, 0, 1, 0), (3,), (0, 1, 3)]
    absent += [(0, 2, 0), (0, 2, 1)]  # of a leaf, and what the node beside it has
    assert trie.find(table(absent, 4)).tolist() == [-1] * len(absent)


@pytest.mark.parametrize("row", [[1, -1, 0], [-1, 1, -1], [1, -2, -1], [1, 0, -3], [1, -1, 1]])
def test_find_knows_no_sequence_that_is_not_padded_with_minus_one(row):
    trie = trie_of([(1,), (0, 0, 0), (0, 0, 1)])
    assert trie.find(np.array([row, [1, -1, -1]])).tolist() == [-1, 0]


def test_find_in_blocks_and_of_any_integer_type(monkeypatch):
    trie = tiny_trie(50, 4, depth=3)
    for dtype in (np.uint64, np.int8, np.int64):
        for block in (7, 50, 51):
            monkeypatch.setattr(trie_module, "FIND_ROWS", block)
            assert trie.find(trie.codes.astype(dtype)).tolist() == list(range(50))
    assert trie.find(np.empty((0, 3), np.int32)).shape == (0,)
    with pytest.raises(ValueError, match="expected"):
        trie.find(trie.codes[:, :2])


@pytest.mark.parametrize(
    ("largest", "kind"), [(5, "int16"), (32_767, "int16"), (32_768, "int32"), (2**31 - 1, "int32")]
)
def test_layout_of_the_file(tmp_path, largest, kind):
    trie_of([(0, 1), (0, 0), (largest,)]).save(tmp_path)
    stored = load_file(tmp_path / FILE)
    assert {name: (str(array.dtype), array.shape) for name, array in stored.items()} == {
        "codes": (kind, (3, 2)),
        "depth": ("uint8", (3,)),
        "leaf": ("int32", (3,)),
        "first_child": ("int32", (6,)),
        "parent": ("int32", (5,)),
        "code": (kind, (5,)),
        "node_item": ("int32", (5,)),
        "level_start": ("int64", (4,)),
    }
    assert stored["codes"].tolist() == [[0, 1], [0, 0], [largest, -1]]


def test_bytes_per_item():
    trie = trie_of([(0, 1), (0, 0), (2,)])  # items: 2 x 2 + 1 + 4; 5 nodes: 3 x 4 + 2; 4 more of CSR; 4 levels
    assert trie.bytes_per_item == (3 * 9 + 5 * 14 + 4 + 4 * 8) / 3


@settings(max_examples=40, deadline=None)
@given(prefix_free())
def test_loaded_and_mapped_are_what_was_saved(tmp_path_factory, own):
    folder, trie = tmp_path_factory.mktemp("codebook") / "new", trie_of(own)
    trie.save(folder)
    loaded, mapped = Trie.load(folder), Trie.load(folder, mapped=True)
    for name in STORED + DERIVED:
        for back in (loaded, mapped):
            assert np.array_equal(getattr(back, name), getattr(trie, name))
            assert getattr(back, name).dtype == getattr(trie, name).dtype
    assert all(isinstance(getattr(mapped, name), np.memmap) for name in STORED)
    assert mapped.find(trie.codes).tolist() == list(range(len(own)))
    assert mapped.bytes_per_item == loaded.bytes_per_item == trie.bytes_per_item
    check_trie(mapped, own)


def test_mapped_arrays_are_views_of_the_file_and_cannot_be_written(tmp_path):
    trie = tiny_trie(30, 4)
    trie.save(tmp_path)
    mapped, loaded = Trie.load(tmp_path, mapped=True), Trie.load(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    start = data.index(trie.leaf.tobytes())
    with open(tmp_path / FILE, "r+b") as handle:
        handle.seek(start)
        handle.write(np.int32(12345).tobytes())
    assert mapped.leaf[0] == 12345
    assert loaded.leaf[0] == trie.leaf[0]
    with pytest.raises(ValueError, match="read-only"):
        mapped.codes[0, 0] = 1


def test_saving_replaces_the_file_at_once(tmp_path, monkeypatch):
    """A killed writer leaves the old file; a mapping of it outlives the new one."""
    old, new = tiny_trie(30, 4), tiny_trie(20, 3, seed=1)
    old.save(tmp_path)
    mapped = Trie.load(tmp_path, mapped=True)

    def die(arrays: dict, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(trie_module, "save_file", die)
        with pytest.raises(OSError, match="no space"):
            new.save(tmp_path)
    assert np.array_equal(Trie.load(tmp_path).codes, old.codes)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    new.save(tmp_path)
    assert np.array_equal(Trie.load(tmp_path).codes, new.codes)
    assert np.array_equal(mapped.codes, old.codes)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_the_file_may_be_read_by_whoever_may_read_others(tmp_path):
    (tmp_path / "other").touch()
    tiny_trie(5, 3).save(tmp_path)
    assert (tmp_path / FILE).stat().st_mode == (tmp_path / "other").stat().st_mode


def check_refused(folder: Path, what: str, got: str) -> None:
    for mapped in (False, True):
        with pytest.raises(ArtifactError, match=what) as caught:
            Trie.load(folder, mapped)
        error = caught.value
        assert error.where == folder / FILE
        assert got in str(error.got)
        assert error.expected
        assert error.fix


def test_missing_file(tmp_path):
    check_refused(tmp_path, "no codebook", "no such file")
    check_refused(tmp_path / "nowhere", "no codebook", "no such file")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -100, -1])
def test_truncated_file(tmp_path, kept):
    tiny_trie(30, 4).save(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:kept])
    check_refused(tmp_path, "codebook is damaged", "bytes")


@pytest.mark.parametrize("data", [b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"\xff\xff"])
def test_a_file_of_something_else(tmp_path, data):
    (tmp_path / FILE).write_bytes(data)
    check_refused(tmp_path, "codebook is damaged", "Error")


@pytest.mark.parametrize("name", [name for name in STORED if name != "level_start"])
def test_missing_tensor(tmp_path, name):
    trie = tiny_trie(30, 4)
    save_file({one: getattr(trie, one) for one in STORED if one != name}, tmp_path / FILE)
    check_refused(tmp_path, "codebook is damaged", name)


@pytest.mark.parametrize("name", [name for name in STORED if name != "codes"])
@pytest.mark.parametrize("change", ["short", "wide", "flat"])
def test_tensors_that_do_not_fit_each_other(tmp_path, name, change):
    trie = tiny_trie(30, 4)
    arrays = {one: getattr(trie, one) for one in STORED}
    if change == "short":
        arrays[name] = arrays[name][:-1]
    elif change == "flat":
        arrays[name] = arrays[name][:, None]
    else:
        arrays[name] = arrays[name].astype(np.int64 if arrays[name].dtype != np.int64 else np.int32)
    save_file(arrays, tmp_path / FILE)
    check_refused(tmp_path, "codebook is damaged", "")


@pytest.mark.parametrize("offsets", [[-120, 0], [0, 60], [8, 4], [1 << 20, (1 << 20) + 120]])
def test_offsets_that_point_elsewhere(tmp_path, offsets):
    tiny_trie(30, 4).save(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["leaf"]["data_offsets"] = offsets
    changed = json.dumps(header).encode()
    (tmp_path / FILE).write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    check_refused(tmp_path, "codebook is damaged", "leaf")


def test_a_file_of_the_layout_before_says_rebuild(tmp_path):
    trie = tiny_trie(30, 4)
    names = ["codes", "depth", "item_path", "num_children", "parent", "level", "code", "node_item"]
    arrays = {name: getattr(trie, name).astype(np.int32) for name in names}
    save_file(arrays | {"first_child": trie.first_child[:-1].copy()}, tmp_path / FILE)
    check_refused(tmp_path, "older layout", "level_start")
    with pytest.raises(ArtifactError, match="rebuild the identifier stage"):
        Trie.load(tmp_path)


@settings(max_examples=40, deadline=None)
@given(prefix_free())
def test_buffers_of_the_heads(own):
    """int64, one entry a node, 0 for the first child of a leaf; children of any node of a level are its children."""
    trie = trie_of(own)
    device = DeviceTrie(trie)
    for name in ("item_path", "depth", "num_children", "code", "level", "parent", "node_item"):
        assert np.array_equal(getattr(device, name).numpy(), getattr(trie, name))
    leaf = trie.num_children == 0
    assert device.first_child[leaf].tolist() == [0] * len(own)
    assert np.array_equal(device.first_child[~leaf].numpy(), trie.first_child[:-1][~leaf])
    assert {str(buffer.dtype) for buffer in device.buffers()} == {"torch.int64"}
    assert len(list(device.buffers())) == 8
    assert device.num_codes == 1 + max(max(path) for path in own)
    for level in range(trie.max_depth):
        nodes = np.flatnonzero(trie.level == level)
        children, valid = device.children_of(device.parent.new_tensor(nodes), level)
        for node, some, real in zip(nodes, children, valid):
            assert some[real].tolist() == np.flatnonzero(trie.parent == node).tolist()
            assert (some[~real] == 0).all()


def test_buffers_of_a_mapped_trie_are_copies(tmp_path):
    trie = tiny_trie(30, 4)
    trie.save(tmp_path)
    plain, mapped = DeviceTrie(trie), DeviceTrie(Trie.load(tmp_path, mapped=True))
    for (name, one), (_, other) in zip(plain.named_buffers(), mapped.named_buffers(), strict=True):
        assert one.equal(other), name
    mapped.code.add_(1)  # a view of the file would end the process
    assert np.array_equal(Trie.load(tmp_path).code, trie.code)
