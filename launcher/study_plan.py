"""What a study would run: every variant and seed as a resolved configuration, before anything starts.

Reads configurations and model folders; writes nothing. `launcher/study.py` carries a plan out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from genrec_dist import methods
from genrec_dist.config import Config, check_name, load_config, parse_override
from genrec_dist.errors import ConfigError
from genrec_dist.pipeline import Stage, closure
from genrec_dist.semantic.encoders import ENCODERS
from genrec_dist.studies.catalogue import STUDIES, Study, find_study
from genrec_dist.studies.recipes import config_file
from genrec_dist.studies.study_data import Variant
from launcher.run import check_batches, is_finished, last_stage


@dataclass(frozen=True)
class Planned:
    """One run of a study.

    Args:
        variant: row of the study.
        seed: of the run.
        config: resolved.
        stages: what it executes.
        source: configuration file.
        overrides: that make `config` of it.
        until: stage that it ends with, None for a whole run.
        obstacle: why this machine cannot make it; what is in the store already is used all the same.
    """

    variant: Variant
    seed: int
    config: Config
    stages: list[Stage]
    source: Path
    overrides: tuple[str, ...]
    until: str | None
    obstacle: str | None

    def blocked(self, store: Path) -> str | None:
        """The obstacle, where it is in the way: an artifact of the text embeddings takes the place of the weights."""
        stages = [stage for stage in closure(self.stages) if stage.name == "semantic"]
        return None if all(is_finished(stage, store) for stage in stages) else self.obstacle


@dataclass(frozen=True)
class Plan:
    """A study with everything resolved before anything starts."""

    name: str
    study: Study
    source: str
    base: Config
    seeds: tuple[int, ...]
    runs: list[Planned]
    identifiers_only: bool

    @property
    def variants(self) -> tuple[Variant, ...]:
        return self.study.variants

    @property
    def absent(self) -> dict[str, str]:
        """Obstacle of each variant that has one."""
        return {run.variant.name: run.obstacle for run in self.runs if run.obstacle}

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.base.name}"


def make_plan(
    name: str,
    config: Path | None,
    data_set: str | None,
    settings: Sequence[str],
    seeds: str | None,
    short: bool,
    encoders: Mapping[str, str] | None = None,
) -> Plan:
    """Resolve and check every run of a study; starts nothing.

    Args:
        name: of the study.
        config: base configuration; None: the study's own.
        data_set: picks the study's own configuration of another data set.
        settings: overrides of the base configuration.
        seeds: numbers separated by commas; None: the configuration's.
        short: stop after the identifiers.
        encoders: study `encoders`: folder of weights, or file of finished embeddings, by name.

    Raises:
        ConfigError: no such study, a setting that the study itself varies, bad seeds, a bad configuration.
    """
    study = find_study(name)
    _refuse_varied(study, settings, seeds)
    if encoders:
        study = with_encoders(name, study, encoders)
    if config is not None and data_set is not None:
        raise ConfigError(
            "two configurations", where="--data", got=f"{config} and --data {data_set}", fix="give one of them"
        )
    path = config or default_config(study, data_set or "beauty")
    base = load_config(path, list(settings))
    numbers = parse_seeds(seeds) if seeds is not None else (base.seed,)
    if short and study.stops == "never":
        raise ConfigError(
            "every number of this study needs the generator",
            where="--identifiers-only",
            got=name,
            expected=f"one of {', '.join(known for known, one in STUDIES.items() if one.stops != 'never')}",
        )
    until = study.until if short or study.stops == "always" else None
    runs = []
    for seed in numbers:
        for variant in study.variants:
            run_name = check_name(f"{name}-{base.name}-{variant.name}-s{seed}")
            overrides = (*settings, *variant.overrides, f"seed={seed}", f"name={run_name!r}")
            resolved = load_config(path, list(overrides))
            check_batches(resolved)
            stages = last_stage(methods.build_stages(resolved), until)
            runs.append(Planned(variant, seed, resolved, stages, path, overrides, until, study.obstacle(resolved)))
    check_name(f"{name}-{base.name}")
    return Plan(name, study, str(path), base, numbers, runs, until is not None)


def with_encoders(name: str, study: Study, places: Mapping[str, str]) -> Study:
    """The study of text encoders with encoders of the user's.

    Args:
        name: of the study.
        study: as in the catalogue.
        places: folder of weights, or file of finished embeddings, by name; a known name keeps its pooling.

    Raises:
        ConfigError: another study.
    """
    if name != "encoders":
        raise ConfigError("only the study of text encoders takes encoders", where="--encoder", got=name)
    variants = {variant.name: variant for variant in study.variants}
    for encoder, place in places.items():
        check_name(encoder, "--encoder")
        overrides = ["method=prorec", f"semantic.model={place!r}"]
        if Path(place).expanduser().is_file():
            overrides.append("semantic.engine=precomputed")
        elif encoder in ENCODERS and ENCODERS[encoder].pooling != "model":
            overrides.append(f"semantic.pooling={ENCODERS[encoder].pooling}")
        label = variants[encoder].label if encoder in variants else encoder
        variants[encoder] = Variant(encoder, label, tuple(overrides))
    return replace(study, variants=tuple(variants.values()))


def parse_encoders(texts: Sequence[str]) -> dict[str, str]:
    """'NAME=PATH' of every `--encoder`.

    Raises:
        ConfigError: no '=', or nothing before or after it.
    """
    found = {}
    for text in texts:
        name, _, place = text.partition("=")
        if not name or not place:
            raise ConfigError("not an encoder", where="--encoder", got=text, expected="NAME=PATH")
        found[name] = place
    return found


def default_config(study: Study, data_set: str) -> Path:
    """The study's configuration of a data set, here or beside the program."""
    return config_file(f"{study.family}_{data_set}.yaml")


def parse_seeds(text: str) -> tuple[int, ...]:
    """'0,1,2' as numbers.

    Raises:
        ConfigError: not numbers, or one twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ConfigError("not seeds", where="--seeds", got=text, expected="different numbers: 0,1,2")
    return tuple(map(int, parts))


def _refuse_varied(study: Study, settings: Sequence[str], seeds: str | None) -> None:
    varied = {parse_override(text)[0] for variant in study.variants for text in variant.overrides}
    for key, _ in map(parse_override, settings):
        if key in varied or (key == "seed" and seeds is not None):
            raise ConfigError(
                "the study sets this itself", where=f"--set {key}", fix="leave it out, or use `genrec run`"
            )


def show_plan(runs: Sequence[Planned], title: str, store: Path, console: Console) -> None:
    """Print runs and what each would build; a stage that several need is counted once."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "build", "reuse", "stages to build"):
        table.add_column(name, justify="right" if name in ("build", "reuse") else "left")
    table.columns[0].overflow = "fold"
    seen: set[tuple[str, str]] = set()
    blocked: dict[str, str] = {}
    for planned in runs:
        if reason := planned.blocked(store):
            blocked[planned.variant.label] = reason
            table.add_row(planned.config.name, "", "", "not on this machine, see below")
            continue
        stages = closure(planned.stages, lambda stage: is_finished(stage, store))
        build = [s for s in stages if not is_finished(s, store) and (s.name, s.key) not in seen]
        seen |= {(stage.name, stage.key) for stage in build}
        titles = ", ".join(stage.title for stage in build)
        table.add_row(planned.config.name, str(len(build)), str(len(stages) - len(build)), titles)
    console.print(f"[bold]{escape(title)}[/]: nothing is started; store {escape(str(store))}")
    console.print(table)
    for label, reason in blocked.items():
        console.print(escape(f"{label}: {reason}"), soft_wrap=True)
