"""What a study's page reads: the runs of its variants by seed, and each number over the seeds. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import stdev
from typing import Any

from genrec_dist.config import Config
from genrec_dist.studies.run_data import RunData


@dataclass(frozen=True)
class Variant:
    """One row of a study.

    Args:
        name: part of the run's name.
        label: what the reader sees.
        overrides: settings that make it, as in `--set`.
    """

    name: str
    label: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Pooled:
    """One number of one variant.

    Args:
        values: by seed.
        intervals: 95% bootstrap interval of each seed, where there is one.
    """

    values: dict[int, float]
    intervals: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return sum(self.values.values()) / len(self.values)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Lowest lower and highest upper bound of the seeds' intervals; without intervals the range of the seeds."""
        if self.intervals:
            return min(low for low, _ in self.intervals.values()), max(high for _, high in self.intervals.values())
        return (min(self.values.values()), max(self.values.values())) if len(self.values) > 1 else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (of a sample: divided by their number less one); None with one seed."""
        return stdev(self.values.values()) if len(self.values) > 1 else None

    def as_dict(self) -> dict:
        """JSON-ready."""
        found: dict[str, Any] = {"mean": self.mean, "seeds": {str(seed): v for seed, v in self.values.items()}}
        if self.deviation is not None:
            found["deviation"] = self.deviation
        if self.intervals:
            found["intervals"] = {str(seed): list(bounds) for seed, bounds in self.intervals.items()}
        return found


@dataclass(frozen=True)
class StudyData:
    """A study's finished runs; what is missing is left out, never an error.

    Args:
        name: of the study.
        title: its heading.
        config: base configuration, before the variants.
        variants: rows.
        seeds: asked for.
        runs: by (variant name, seed), those that exist.
        folder: where the study is written, and the maps are kept.
        identifiers_only: the runs end before a generator, by the study or by the user's wish.
        absent: why a variant cannot be run on this machine, by name.
    """

    name: str
    title: str
    config: Config
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    runs: dict[tuple[str, int], RunData]
    folder: Path
    identifiers_only: bool = False
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, str]:
        return {variant.name: variant.label for variant in self.variants}

    def of(self, variant: str) -> dict[int, RunData]:
        """Runs of a variant by seed."""
        return {seed: self.runs[variant, seed] for seed in self.seeds if (variant, seed) in self.runs}

    def pool(self, variant: str, read: Callable[[RunData], float | None]) -> Pooled | None:
        """A number of every seed that has it; None when none has."""
        found = {seed: read(run) for seed, run in self.of(variant).items()}
        values = {seed: float(value) for seed, value in found.items() if value is not None}
        return Pooled(values) if values else None

    def fact(self, variant: str, file: str, *path: str) -> Pooled | None:
        """A number in a JSON file of the identifiers artifact."""
        return self.pool(variant, lambda run: dig(run.json("identifiers", file), *path))

    def metric(self, variant: str, name: str) -> Pooled | None:
        """A test metric with its bootstrap intervals."""
        return self._scored(variant, name, lambda run: run.main)

    def reference(self, name: str, metric: str) -> Pooled | None:
        """A test metric of a reference method, from the first variant that has it."""
        for variant in self.variants:
            pooled = self._scored(variant.name, metric, lambda run: run.references.get(name))
            if pooled is not None:
                return pooled
        return None

    def without_mix(self, variant: str, name: str) -> Pooled | None:
        """A test metric of the beam alone, where the run mixes the distillation token's dense score in."""
        return self.pool(variant, lambda run: dig(run.main, "without_mix", name))

    def _scored(self, variant: str, name: str, evaluation: Callable[[RunData], dict | None]) -> Pooled | None:
        pooled = self.pool(variant, lambda run: dig(evaluation(run), "test", name))
        if pooled is None:
            return None
        bounds = {seed: dig(evaluation(run), "intervals", name) for seed, run in self.of(variant).items()}
        kept = {seed: (pair[0], pair[1]) for seed, pair in bounds.items() if pair and seed in pooled.values}
        return Pooled(pooled.values, kept)

    @property
    def references(self) -> list[str]:
        """Reference methods of any run, in order; Stage I only where there is one variant, whose it is."""
        found = dict.fromkeys(name for run in self.runs.values() for name in run.references)
        return [name for name in found if name != "stage_one" or len(self.variants) == 1]

    @property
    def data_set(self) -> str | None:
        """Data set of the runs, None before there is one."""
        return self.any_run.data_set if self.any_run else None

    @property
    def any_run(self) -> RunData | None:
        return next(iter(self.runs.values()), None)

    @property
    def missing(self) -> list[str]:
        """Runs that are asked for and have no result, as a reader wants them."""
        lacking = []
        for variant in self.variants:
            found = self.of(variant.name)
            if variant.name in self.absent and not found:
                lacking.append(f"{variant.label} ({self.absent[variant.name]})")
                continue
            for seed in self.seeds:
                if seed not in found:
                    lacking.append(f"{variant.label}, seed {seed}")
                elif found[seed].main is None and not self.identifiers_only:
                    lacking.append(f"{variant.label}, seed {seed} (started, no result)")
        return lacking

    @property
    def order(self) -> str:
        """Order of interactions."""
        found = {(run.main or {}).get("order") or run.config.catalog.order for run in self.runs.values()}
        return ", ".join(sorted(found)) or self.config.catalog.order

    def run_facts(self) -> list[dict]:
        """Name, commit, hardware and time of every run that exists, JSON-ready."""
        return [
            {"variant": variant, "seed": seed, **_facts(run)}
            for (variant, seed), run in sorted(self.runs.items(), key=lambda item: self._place(item[0]))
        ]

    def _place(self, key: tuple[str, int]) -> tuple[int, int]:
        return list(self.labels).index(key[0]), key[1]


def dig(value: Any, *path: str) -> Any:
    """A value inside nested mappings, None where a key is missing."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _facts(run: RunData) -> dict:
    record = run.provenance
    built = {
        (event["stage"], event["key"]): event["seconds"] for event in run.events if event["event"] == "stage_built"
    }
    gpus = record.get("gpus") or []
    cpu = f"{record.get('cpu') or 'CPU'}, {record.get('cpu_cores', '?')} cores"
    on_gpu = bool(gpus) and run.config.runtime.device != "cpu"
    return {
        "run": run.run.path.name,
        "commit": dig(record, "git", "commit"),
        "dirty": dig(record, "git", "dirty"),
        "hardware": ", ".join(dict.fromkeys(gpus)) if on_gpu else cpu,
        "started": record.get("started"),
        "build_seconds": round(sum(built.get((title, link["key"]), 0.0) for title, link in run.links.items()), 2),
    }
