"""Made-up runs of a study's variants: metrics, losses and uniqueness as the stages write them, without the stages."""

from __future__ import annotations

from pathlib import Path

from fake_run import FakeRun

from genrec_dist.artifacts.files import write_json
from genrec_dist.studies.catalogue import STUDIES
from genrec_dist.studies.run_data import RunData
from genrec_dist.studies.study_data import StudyData

BEAUTY = {"source": "parquet", "path": "beauty"}


class FakeStudy:
    """A study over runs that are made one by one.

    Args:
        root: gets `store/` and `runs/`.
        name: of the study.
        seeds: of its runs.
    """

    def __init__(self, root: Path, name: str, seeds: tuple[int, ...] = (0,)) -> None:
        self.root, self.name, self.seeds = root, name, seeds
        self.runs: dict[tuple[str, int], RunData] = {}

    def run(self, variant: str, seed: int = 0) -> FakeRun:
        """An empty run of a variant."""
        fake = FakeRun(
            self.root, name=f"{self.name}-fake-{variant}-s{seed}", catalog=BEAUTY, method="csj_id", seed=seed
        )
        self.runs[variant, seed] = RunData(fake.run)
        return fake

    def result(self, fake: FakeRun, recall: float, half: float = 0.001, references: dict | None = None) -> None:
        """metrics.json: Recall@10 as given, the other metrics in proportion, intervals of the same half-width."""
        shares = {
            f"{kind}@{k}": k / 10 * part for kind, part in (("recall", 1.0), ("ndcg", 0.5)) for k in (1, 5, 10, 20)
        }
        test = {name: recall * share for name, share in shares.items()}
        intervals = {name: [value - half, value + half] for name, value in test.items()}
        main = {"test": test, "intervals": intervals, "users": 22363, "order": "time"}
        fake.summary(main, references or {})

    def identifiers(self, fake: FakeRun, losses: dict | None = None, unique: int = 0) -> None:
        """Identifier artifact with rqvae.json and the uniqueness of 12,000 items."""

        def write(out: Path) -> None:
            if losses:
                explained = {"semantic": 0.9, "collaborative": 0.6}
                write_json(out / "rqvae.json", {"losses": losses, "explained": explained})
            before = {"unique_codes": unique, "coverage": unique / 12000}
            resolved = {"method": "dedup", "moved": 12000 - unique, "after": 1.0}
            quality = {"num_items": 12000, "unique_fraction": 1.0, "mean_depth": 4.25}
            write_json(out / "quality.json", quality | {"before_collisions": before, "collision_handling": resolved})

        fake.add("identifiers", write)

    def data(self, identifiers_only: bool = False) -> StudyData:
        """What the page function reads."""
        config = next(iter(self.runs.values())).config
        study, folder = STUDIES[self.name], self.root / "runs" / f"{self.name}-fake"
        return StudyData(
            self.name, study.title, config, study.variants, self.seeds, self.runs, folder, identifiers_only
        )
