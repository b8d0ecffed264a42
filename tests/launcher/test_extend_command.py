"""`genrec data extend`: codes for new items from the command line."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.files import read_json
from genrec_dist.artifacts.store import problems_of
from genrec_dist.identifiers.hierarchical import TreeOptions, build_tree
from genrec_dist.identifiers.rows import ArrayRows
from genrec_dist.identifiers.tree import Splits
from genrec_dist.identifiers.trie import Trie, build_trie
from launcher.cli import app

ROWS = np.random.default_rng(0).normal(size=(230, 6)).astype(np.float32)


def extend(*words) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["data", "extend", *map(str, words)])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture
def folders(tmp_path):
    """Codes of 200 items, and embeddings of these and 30 more."""
    codes = tmp_path / "codes"
    codes.mkdir()
    tree = build_tree(ArrayRows(ROWS[:200]), TreeOptions(16))
    build_trie(tree.codes, tree.depth).save(codes)
    Splits.write(codes, tree.splits, 16, "euclidean", 6)
    write_embeddings(tmp_path / "rows", ROWS)
    return tmp_path


def test_old_codes_stay_and_new_items_get_theirs(folders):
    code, text = extend(folders / "codes", folders / "rows", "--skip", 200, "--out", folders / "more")
    assert code == 0, text
    assert "200 items and 30 new ones; 0 codes changed" in text
    old, new = Trie.load(folders / "codes"), Trie.load(folders / "more")
    assert np.array_equal(new.codes[:200, : old.max_depth], old.codes)
    assert new.num_items == 230
    assert read_json(folders / "more" / "extension.json")["changed"] == 0
    assert problems_of(folders / "more") == []
    code, text = extend(folders / "more", folders / "rows", "--skip", 220, "--out", folders / "again")
    assert code == 0, text
    assert Trie.load(folders / "again").num_items == 240


def test_what_cannot_be_done_is_said_and_leaves_nothing(folders):
    code, text = extend(folders / "codes", folders / "rows", "--skip", 230, "--out", folders / "more")
    assert code == 2
    assert "fewer than the 230 rows" in text
    write_embeddings(folders / "wide", np.ones((3, 7), np.float32))
    code, text = extend(folders / "codes", folders / "wide", "--out", folders / "more")
    assert code == 3
    assert "another width" in text
    (folders / "codes" / "splits.safetensors").unlink()
    code, text = extend(folders / "codes", folders / "rows", "--out", folders / "more")
    assert code == 3
    assert "hierarchical_kmeans" in text
    assert not (folders / "more").exists()
    (folders / "rows" / "keep.txt").write_text("mine")
    code, text = extend(folders / "codes", folders / "rows", "--out", folders / "rows")
    assert code != 0
    assert (folders / "rows" / "keep.txt").exists()
