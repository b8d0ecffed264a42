"""A whole run folder from random data, in the formats that the stages write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.files import append_jsonl, write_json
from genrec_dist.artifacts.ledger import Ledger
from genrec_dist.artifacts.store import ArtifactStore, content_key
from genrec_dist.collaborative.similarity import modality_similarity
from genrec_dist.config import build_config
from genrec_dist.evaluation.bootstrap import bootstrap_intervals
from genrec_dist.evaluation.metrics import rank_metrics
from genrec_dist.identifiers.quality import codebook_quality
from genrec_dist.identifiers.trie import build_trie
from genrec_dist.runs import RunFolder

CUTOFFS = [1, 5, 10, 20]
HOSTILE = "<script>alert('x')</script>"


class FakeRun:
    """Writes artifacts and links them, one method a stage.

    Args:
        root: folder that gets `store/` and `runs/`.
        values: configuration.
    """

    def __init__(self, root: Path, num_items: int = 300, num_users: int = 400, **values: object) -> None:
        self.store = ArtifactStore(root / "store")
        self.run = RunFolder(root / "runs", str(values.get("name", "fake")))
        self.config = build_config({"report": {"tsne_items": 60}, **values})
        self.run.create(self.config, ["genrec", "run", "configs/fake.yaml", "--set", f"name={HOSTILE}"])
        self.num_items, self.num_users = num_items, num_users
        self.generator = np.random.default_rng(0)

    def semantic_report(self) -> dict:
        timing = {"workers": 1, "seconds": 0.4, "startup_seconds": 2.0, "items_per_second": 812.25}
        return {
            "engine": "vllm",
            "model": "minilm",
            "dim": 16,
            "store_dtype": "bfloat16",
            "max_tokens": 128,
            "num_items": self.num_items,
            "num_tokens": 40 * self.num_items,
            "num_truncated": 6,
            "num_failed": 2,
            "timing": timing | {"tokens_per_second": 32_490.0},
        }

    def add(self, title: str, write, state: str = "stage_built") -> Path:
        """Build one artifact with `write(folder)`, link it and say so in the events."""
        stage, key = title.split()[0], content_key("fake", 1, {"run": self.run.path.name, "title": title}, {})
        with self.store.building(stage, key) as out:
            write(out)
            folder = self.store.finish(stage, key, {})
        extra = {"seconds": 12.5} if state == "stage_built" else {}
        self.run.event(state, stage=title, key=key, **extra)
        self.run.link(title, stage, key, folder)
        return folder

    def catalog(self, oracle: dict | None = None) -> None:
        def write(out: Path) -> None:
            brands = np.array(["Plain", "Calm & Co", HOSTILE])
            titles = [f"{HOSTILE} item {i}" if i % 2 else None for i in range(self.num_items)]
            columns = {
                "item_id": [f"B{i:05d}" for i in range(self.num_items)],
                "title": titles,
                "brand": brands[np.arange(self.num_items) % 3].tolist(),
            }
            pq.write_table(pa.table(columns), out / "items.parquet")
            stats = {
                "num_users": self.num_users,
                "num_items": self.num_items,
                "num_interactions": 198502,
                "input": {"bad_rows": 3},
            }
            write_json(out / "stats.json", {**stats, "sequence_length": {"mean": 8.876, "max": 204}})
            ledger = Ledger()
            ledger.add("reviews.json.gz", 17, HOSTILE, detail="broken line")
            ledger.write(out)
            if oracle:
                write_json(out / "oracle.json", {"users": self.num_users, "metrics": oracle})

        self.add("catalog", write, "stage_reused")

    def embeddings(self) -> None:
        centres = self.generator.normal(size=(12, 16)) * 2
        group = self.generator.integers(12, size=self.num_items)
        self.semantic = (centres[group] + self.generator.normal(size=(self.num_items, 16))).astype(np.float32)
        self.collaborative = (0.4 * self.semantic[:, :8] + self.generator.normal(size=(self.num_items, 8))).astype(
            np.float32
        )
        self.integrated = np.hstack([self.collaborative, 0.8 * self.semantic[:, :8]]).astype(np.float32)

        def write_semantic(out: Path) -> None:
            write_embeddings(out, self.semantic)
            write_json(out / "report.json", self.semantic_report())
            write_json(out / "ledger.json", {"counts": {"empty_text": {"kept": 3}}, "listed": 3, "total": 3})

        def write_fusion(out: Path) -> None:
            write_embeddings(out, self.integrated)
            for part in ("collaborative", "adapted"):
                (out / part).mkdir()
                write_embeddings(out / part, self.collaborative)
            concat = np.hstack([5 * self.semantic, self.collaborative])
            tables = {"ours": self.integrated, "concat": concat}
            shares = {k: modality_similarity(self.semantic, self.collaborative, t) for k, t in tables.items()}
            write_json(out / "similarity.json", shares)

        self.add("semantic", write_semantic, "stage_reused")
        self.add("fusion", write_fusion)
        self.curve("fusion", ["next", "align"])

    def curve(self, stage: str, parts: list[str], epochs: int = 12) -> None:
        for step in range(1, epochs * 10 + 1):
            pieces = {f"loss_{p}": 3 / (i + 1) * np.exp(-step / 60) + 0.4 for i, p in enumerate(parts)}
            record = {
                "split": "train",
                "step": step,
                "epoch": step / 10,
                "loss": 1 + sum(pieces.values()) + 3 * np.exp(-step / 50),
                **pieces,
            }
            self.run.metric(stage=stage, **record, learning_rate=1e-3, samples_per_second=4100.0)
            if step % 10 == 0:
                rise = 1 - np.exp(-step / 40) - (step / 300) ** 2
                scores = {"recall@10": 0.08 * rise, "ndcg@10": 0.045 * rise}
                self.run.metric(stage=stage, split="valid", step=step, epoch=step / 10, **scores)

    def identifiers(self) -> None:
        first = self.generator.integers(16, size=self.num_items)
        second = np.zeros(self.num_items, dtype=int)
        for cluster in range(16):
            second[first == cluster] = np.arange((first == cluster).sum())
        codes = np.stack([first, second], axis=1).astype(np.int32)
        depth = np.full(self.num_items, 2, dtype=np.int32)

        def write(out: Path) -> None:
            build_trie(codes, depth).save(out)
            write_json(out / "quality.json", codebook_quality(codes, depth, 64, self.semantic))

        self.add("identifiers", write)

    def generator_stage(self) -> None:
        self.add("generator", lambda out: write_json(out / "state.json", {}))
        self.curve("generator", ["code", "distill"])

    def evaluation(self, method: str, title: str, strength: float, beam: int | None) -> dict:
        drawn = self.generator.geometric(strength, self.num_users)
        ranks = np.where(drawn > (beam or 100), 0, drawn).astype(np.int32)
        metrics = {
            "method": method,
            "order": self.config.catalog.order,
            "users": self.num_users,
            "beam_width": beam,
            "mix_weight": 0.3 if beam else 0.0,
            "test": rank_metrics(ranks, CUTOFFS),
            "valid": rank_metrics(ranks[::2], CUTOFFS),
            "intervals": bootstrap_intervals(ranks, CUTOFFS, 200, 0),
            "without_ties": {"users": self.num_users // 2, **rank_metrics(ranks[::2], CUTOFFS)},
            "masked_seen": rank_metrics(np.maximum(ranks - 1, 0), CUTOFFS),
            "seconds": 75.2,
        }
        if beam:
            both = {"beam": rank_metrics(ranks[:100], CUTOFFS), "exact": rank_metrics(ranks[:100] + 0, CUTOFFS)}
            metrics["exact"] = {"users": 100, **both, "top10_agreement": 0.9375}
            metrics["without_mix"] = rank_metrics(ranks[1::2], CUTOFFS)

        def write(out: Path) -> None:
            write_json(out / "metrics.json", metrics)
            users = np.arange(self.num_users, dtype=np.int32)
            pq.write_table(pa.table({"user_index": users, "target": users, "rank": ranks}), out / "ranks.parquet")

        self.add(title, write)
        return metrics

    def summary(self, main: dict, references: dict[str, dict]) -> None:
        write_json(
            self.run.path / "metrics.json", {"method": self.config.method, "main": main, "references": references}
        )


def full_run(root: Path, oracle: dict | None = None, **values: object) -> FakeRun:
    """A finished run with every stage."""
    fake = FakeRun(root, **values)
    fake.catalog(oracle)
    fake.embeddings()
    fake.identifiers()
    fake.generator_stage()
    main = fake.evaluation("prorec", "evaluation", 0.012, beam=50)
    references = {
        "popularity": fake.evaluation("popularity", "evaluation popularity", 0.0015, beam=None),
        "sasrec_cosine": fake.evaluation("sasrec", "evaluation sasrec_cosine", 0.014, beam=None),
    }
    fake.curve("sasrec_cosine", [])
    fake.summary(main, references)
    append_jsonl(fake.run.path / "events.jsonl", {"time": 1.0, "event": "run_finished"})
    return fake
