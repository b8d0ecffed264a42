"""A sweep with everything resolved and checked before anything starts: its trials, and the stages that they share.

Every trial's configuration is built and checked here. Reads configurations and input files, writes nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from genrec_dist.artifacts.files import canonical_json
from genrec_dist.config import NAME_PATTERN, Config, build_config, check_name, merge_setting, parse_override
from genrec_dist.errors import ConfigError
from genrec_dist.pipeline import Stage, closure
from genrec_dist.studies.scaling.ladder import Ladder
from genrec_dist.studies.scaling.sweep_file import SweepFile

LONGEST_LABEL = 48


@dataclass(frozen=True)
class PlannedTrial:
    """One run of a sweep.

    Args:
        name: of its run folder.
        arm, depth, seed: what it is in the report.
        point: what the grid and the explicit points set in it, by dotted key.
        settings: point, depth, and what follows from the depth.
        config: resolved.
        stages: what it executes.
    """

    name: str
    arm: str
    depth: int
    seed: int
    point: dict[str, Any]
    settings: dict[str, Any]
    config: Config
    stages: list[Stage]

    @property
    def label(self) -> str:
        """Of its point; empty without one."""
        return _label(self.point) if self.point else ""

    @property
    def keys(self) -> set[tuple[str, str]]:
        """Stage name and content hash of everything that it reads or builds."""
        return {(stage.name, stage.key) for stage in without_placements(self.stages)}


@dataclass(frozen=True)
class Unit:
    """What one child process executes: a trial, or stages that several trials need.

    Args:
        name: of its run folder.
        shared: stages for several trials.
        config: resolved; `config.name` is the name.
        stages: what it executes.
        needs: names of the shared units that have to be finished before.
    """

    name: str
    shared: bool
    config: Config
    stages: list[Stage] = field(repr=False)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A sweep, resolved."""

    name: str
    title: str
    ladder: str
    trials: list[PlannedTrial]
    units: list[Unit]


def make_plan(
    name: str,
    file: SweepFile,
    folder: Path,
    build_stages: Callable[[Config], list[Stage]],
    check: Callable[[Config], None],
    overrides: Sequence[str] = (),
) -> Plan:
    """Resolve and check every trial.

    Args:
        name: of the sweep.
        file: what to run.
        folder: that relative paths of configurations go from.
        build_stages: configuration -> stages.
        check: raises where a configuration cannot run as it is.
        overrides: 'key=value' settings of every arm, the last word but for what is swept.

    Raises:
        ConfigError: a configuration is missing or wrong, a swept key is also set by hand, or two trials are the same.
    """
    check_name(name)
    trials = []
    for arm, spec in file.arms.items():
        values = _read(folder / spec.config)
        for key, value in (file.set | spec.set).items():
            merge_setting(values, key, value)
        base = build_config(values | {"name": "base"}, list(overrides), where=f"arms.{arm}")
        varied = _points(file)
        ladder = Ladder(file.ladder, base.method) if file.depths else None
        _refuse_twice(ladder, varied, overrides)
        depths: list[int | None] = [*file.depths] or [None]
        for point, depth, seed in itertools.product(varied, depths, file.seeds):
            trials.append(_trial(arm, base, point, ladder, depth, seed, build_stages, check))
    _refuse_same(trials)
    return Plan(name, file.title or name, file.ladder, trials, make_units(trials))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError("no such configuration file", where=path, fix="paths in a sweep file go from its folder")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("configuration is not YAML", where=path, got=str(error)) from error
    if not isinstance(values, dict):
        raise ConfigError("configuration is not a mapping", where=path, got=type(values).__name__)
    return values


def _points(file: SweepFile) -> list[dict[str, Any]]:
    """Every explicit point with every combination of the grid."""
    combinations = [dict(zip(file.grid, values)) for values in itertools.product(*file.grid.values())]
    return [point | combined for point in file.points or [{}] for combined in combinations]


def _refuse_twice(ladder: Ladder | None, points: list[dict[str, Any]], overrides: Sequence[str]) -> None:
    """What the sweep varies has no other source."""
    swept = {"seed", "name"} | ({ladder.key} if ladder else set())
    by_hand = {parse_override(text)[0] for text in overrides}
    in_points = set().union(*points)
    for key in sorted((by_hand | in_points) & swept | by_hand & in_points):
        raise ConfigError(
            "the sweep sets this itself",
            where=key,
            expected="depths, seeds and points in the sweep file only",
            fix="leave it out of --set, grid and points",
        )


def _trial(
    arm: str,
    base: Config,
    point: dict[str, Any],
    ladder: Ladder | None,
    depth: int | None,
    seed: int,
    build_stages: Callable[[Config], list[Stage]],
    check: Callable[[Config], None],
) -> PlannedTrial:
    values = base.model_dump(mode="json")
    for key, value in point.items():
        merge_setting(values, key, value)
    settings = dict(point)
    if ladder is not None and depth is not None:
        settings |= ladder.settings(build_config(values, where=f"arms.{arm}, points"), depth)
    parts = [arm, *([f"d{depth}"] if depth else []), f"s{seed}", *([_label(point)] if point else [])]
    name = check_name("-".join(parts), f"arms.{arm}")
    for key, value in (settings | {"seed": seed, "name": name}).items():
        merge_setting(values, key, value)
    config = build_config(values, where=name)
    check(config)
    if depth is None:
        depth = Ladder("fixed_width", config.method).depth_of(config)
    return PlannedTrial(name, arm, depth, seed, point, settings, config, build_stages(config))


def _label(point: dict[str, Any]) -> str:
    """Readable and short: 'dropout0.1-lambda0.5', or a hash of the point where that is too long or not a name."""
    show = lambda value: value if isinstance(value, str) else json.dumps(value)  # noqa: E731
    parts = [key.rsplit(".", 1)[-1] + show(value) for key, value in point.items()]
    text = "-".join(parts)
    if len(text) <= LONGEST_LABEL and NAME_PATTERN.match(text):
        return text
    return hashlib.sha256(canonical_json(point).encode()).hexdigest()[:8]


def _refuse_same(trials: list[PlannedTrial]) -> None:
    names: dict[Any, PlannedTrial] = {}
    contents: dict[Any, PlannedTrial] = {}
    for trial in trials:
        for known, key, what in ((names, trial.name, "name"), (contents, frozenset(trial.keys), "settings")):
            if key in known:
                raise ConfigError(
                    f"two trials have the same {what}",
                    where=f"{known[key].name} and {trial.name}",
                    got=trial.settings,
                    fix="a key of the grid that an arm's method does not read gives the same run again: leave it out",
                )
            known[key] = trial


def without_placements(stages: list[Stage]) -> list[Stage]:
    """The stages and everything they read, inputs first."""
    return closure(stages, lambda stage: True)


def make_units(trials: list[PlannedTrial]) -> list[Unit]:
    """What has to be executed, shared stages first: stages that the same trials need, two at least, are one unit."""
    users: dict[tuple[str, str], set[str]] = defaultdict(set)
    stages: dict[tuple[str, str], Stage] = {}
    for trial in trials:
        for stage in without_placements(trial.stages):
            users[stage.name, stage.key].add(trial.name)
            stages.setdefault((stage.name, stage.key), stage)
    groups: dict[frozenset[str], list[Stage]] = defaultdict(list)
    for key, stage in stages.items():
        if len(users[key]) > 1:
            groups[frozenset(users[key])].append(stage)
    named = {group: f"{found[-1].name}-{found[-1].key[:8]}" for group, found in groups.items()}
    configs = {trial.name: trial.config for trial in trials}
    units = []
    for group, found in groups.items():
        first = next(trial.name for trial in trials if trial.name in group)
        inputs = {frozenset(users[stage.name, stage.key]) for stage in without_placements(found)}
        needs = tuple(sorted(named[other] for other in inputs if other != group))
        config = configs[first].model_copy(update={"name": named[group]})
        units.append(Unit(named[group], True, config, found, needs))
    for trial in trials:
        needs = tuple(sorted(name for group, name in named.items() if trial.name in group))
        units.append(Unit(trial.name, False, trial.config, trial.stages, needs))
    return units
