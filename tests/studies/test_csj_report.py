"""The ordinary report of CSJ-ID runs: training, losses and uniqueness of an RQ-VAE, rows of its own paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_run import FakeRun
from test_report import Page

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.files import write_json
from genrec_dist.identifiers.quality import codebook_quality
from genrec_dist.identifiers.trie import build_trie
from genrec_dist.studies.report import write_report

BEFORE = {"unique_codes": 270, "coverage": 0.9}


def csj_run(root: Path, method: str = "csj_id", learned: bool = True) -> FakeRun:
    """A finished run with random codes, as an RQ-VAE would leave it."""
    catalog = {"source": "parquet", "path": "beauty"}
    fake = FakeRun(root, method=method, catalog=catalog, identifiers={"tokenizer": "rqvae"}, references=["popularity"])
    fake.catalog()
    table = fake.generator.normal(size=(fake.num_items, 8)).astype(np.float32)
    codes = np.stack([np.arange(fake.num_items) % 20, np.arange(fake.num_items) // 20], 1).astype(np.int32)
    depth = np.full(len(codes), 2, np.int32)

    def identifiers(out: Path) -> None:
        build_trie(codes, depth).save(out)
        write_embeddings(out, table)
        quality = codebook_quality(codes, depth, 20, table)
        if learned:
            quality |= {
                "before_collisions": BEFORE,
                "collision_handling": {"method": "dedup", "moved": 60, "after": 1.0},
            }
            losses = {"semantic": 0.00125, "collaborative": 0.5, "total": 0.75}
            write_json(out / "rqvae.json", {"losses": losses, "explained": {"semantic": 0.625}})
        write_json(out / "quality.json", quality)

    fake.add("semantic", lambda out: write_embeddings(out, table))
    fake.add("lightgcn", lambda out: write_embeddings(out, table[:, :4].copy()))
    fake.add("identifiers", identifiers)
    for step in range(1, 9) if learned else ():
        fake.run.metric(stage="identifiers", split="train", step=step, epoch=step / 2, loss=1 / step, loss_commit=0.1)
        shares = {"explained_semantic": step / 10, "explained_collaborative": step / 20, "explained": step / 16}
        fake.run.metric(stage="identifiers", split="valid", step=step, epoch=step / 2, unique=0.9, **shares)
    fake.add("gpt", lambda out: write_json(out / "summary.json", {}))
    fake.curve("gpt", ["level_1", "level_2"])
    main = fake.evaluation("gpt", "evaluation", 0.01, beam=50)
    fake.summary(main, {"popularity": fake.evaluation("popularity", "evaluation popularity", 0.001, beam=None)})
    return fake


def test_learned_codes_show_training_losses_and_uniqueness(tmp_path):
    page = Page(write_report(csj_run(tmp_path).run))
    assert page.row("semantic")[1:] == ["0.00125", "62.5%"]
    assert page.row("collaborative")[1:] == ["0.5", "–"]
    assert page.row("before collisions are resolved")[1:] == ["270", "90.00%"]
    assert page.row("after")[1:] == ["300", "100.00%"]
    assert "resolved by dedup: 60 items" in page.text
    assert "best 50.0%, dotted" in page.text
    assert "explained semantic" in page.text
    assert "Stage “identifiers”" not in page.text  # its curve stands with the identifiers
    assert "Stage “gpt”" in page.text
    assert page.row("gpt")[1] == "built"
    assert "quantised" in page.text


def test_codes_without_training_leave_all_that_out(tmp_path):
    page = Page(write_report(csj_run(tmp_path, learned=False).run))
    assert "identifiers" in page.ids
    assert "Training of the tokenizer" not in page.text
    assert not [row for row in page.rows if row and row[0].startswith("before collisions")]


@pytest.mark.parametrize(
    ("method", "label", "value"),
    [
        ("csj_id", "CSJ-ID, its own paper (4.2)", "0.0220"),
        ("semantic_id", "Semantic-only, its own paper (4.2)", "0.0090"),
    ],
)
def test_own_papers_row(tmp_path, method, label, value):
    page = Page(write_report(csj_run(tmp_path, method).run))
    assert page.row(label)[1] == value
    assert page.row(f"this run ({method})")[1]
    assert page.row("TIGER, paper Table 3")[1] == "0.0617"
    assert f"× its own paper's ({value}" in page.text
    assert "multiples of 0.0005" in page.text
    assert page.row("interactions") == ["interactions", "198,502", "198,502"]
