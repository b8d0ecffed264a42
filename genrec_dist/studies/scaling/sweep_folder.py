"""`runs/<sweep>/`: all that is known of a sweep, as files; whoever sees the folder can go on with it.

sweep.json (what is run, with every resolved configuration), trials/<name>/ and shared/<name>/ (ordinary run folders),
claims/ (who is at work), logs/ (what child processes print), and the report. Decides what may change between two calls;
starts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.config import Config, build_config
from genrec_dist.errors import ConfigError
from genrec_dist.runs import RunFolder
from genrec_dist.studies.scaling.plan import Plan, PlannedTrial, Unit, without_placements

FORMAT = 1
NOT_COMPARED = {"name", "runtime", "report", "tracking"}
"""Sections that may change between two calls: they change no number."""
SHOWN = 6


class SweepFolder:
    """One sweep on disk.

    Args:
        root: folder of all runs.
        name: of the sweep.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.path = RunFolder(root, name).path
        self.file = self.path / "sweep.json"

    @classmethod
    def find(cls, root: Path, name: str) -> SweepFolder | None:
        """The sweep of this name, or of this path; None when it is no sweep."""
        path = Path(name)
        folder = cls(path.parent, path.name) if len(path.parts) > 1 else cls(root, name)
        return folder if folder.file.is_file() else None

    def read(self) -> dict[str, Any]:
        """The record.

        Raises:
            ConfigError: of a format that this version does not know.
        """
        record = read_json(self.file)
        if record.get("format") != FORMAT:
            raise ConfigError(
                "sweep of another version",
                where=self.file,
                got=f"format {record.get('format')}",
                expected=f"format {FORMAT}",
                fix="give the sweep another --name",
            )
        return record

    def run(self, name: str, shared: bool) -> RunFolder:
        """Run folder of a unit."""
        return RunFolder(self.path / ("shared" if shared else "trials"), name)

    def write(self, plan: Plan, extended: dict[str, list[int]], source: str, store: Path, command: list[str]) -> None:
        """Record the sweep; what it is becomes what it was planned to be."""
        trials = {trial.name: trial for trial in plan.trials}
        units = []
        for unit in plan.units:
            record: dict[str, Any] = {"name": unit.name, "shared": unit.shared, "needs": list(unit.needs)}
            record["stages"] = [{"title": s.title, "stage": s.name, "key": s.key} for s in unit.stages]
            if not unit.shared:
                trial = trials[unit.name]
                record |= {"arm": trial.arm, "point": trial.label, "depth": trial.depth, "seed": trial.seed}
                record |= {"varied": sorted(trial.point), "settings": trial.settings}
            units.append(record | {"config": unit.config.model_dump(mode="json")})
        write_json(
            self.file,
            {
                "format": FORMAT,
                "name": plan.name,
                "title": plan.title,
                "ladder": plan.ladder,
                "source": source,
                "extended": extended,
                "store": str(store.resolve()),
                "command": command,
                "written": time.time(),
                "units": units,
            },
        )

    def refuse_change(self, plan: Plan, welcome: Callable[[PlannedTrial], bool]) -> list[str]:
        """Compare the plan with the record; names of the trials that it adds.

        Args:
            plan: what is asked for now.
            welcome: whether a new trial was asked for.

        Raises:
            ConfigError: a trial has other settings than recorded, is not asked for any more, or is new and not
                welcome.
        """
        if not self.file.is_file():
            return []
        recorded = {unit["name"]: unit for unit in self.read()["units"] if not unit["shared"]}
        planned = {trial.name: trial for trial in plan.trials}
        changed = []
        for name in recorded.keys() & planned.keys():
            was, now = (_compared(c) for c in (recorded_config(recorded[name]), planned[name].config))
            differing = [key for key in now if was.get(key) != now[key]]
            changed += [f"{name}: {key} was {was.get(key)}, is {now[key]}" for key in differing]
        gone = [f"{name}: was there, is not asked for" for name in recorded.keys() - planned.keys()]
        new = sorted(planned.keys() - recorded.keys())
        if changed or gone:
            raise ConfigError(
                "the sweep has begun with other settings",
                where=self.path,
                got=_listed(sorted(changed + gone)),
                fix="put the sweep file back, or give the changed sweep a --name of its own",
            )
        uninvited = [name for name in new if not welcome(planned[name])]
        if uninvited:
            raise ConfigError(
                "the sweep file has trials that the sweep does not have",
                where=self.path,
                got=_listed([f"{name}: new" for name in uninvited]),
                fix="add --extend file to take them in, or give the changed sweep a --name of its own",
            )
        return new

    def unit(self, name: str, build_stages: Any, runtime: dict[str, Any]) -> Unit:
        """A recorded unit, ready to be executed.

        Args:
            name: of the unit.
            build_stages: configuration -> stages.
            runtime: settings of the runtime section that take the place of the recorded ones.

        Raises:
            ConfigError: no such unit, or the stages that it stands for are no longer those of its configuration.
        """
        record = next((unit for unit in self.read()["units"] if unit["name"] == name), None)
        if record is None:
            raise ConfigError("the sweep has no such unit", where=self.file, got=name)
        config = recorded_config(record)
        settings = type(config.runtime).model_validate(config.runtime.model_dump() | runtime)
        config = config.model_copy(update={"runtime": settings})
        wanted = {(s["stage"], s["key"]) for s in record["stages"]}
        stages = [stage for stage in without_placements(build_stages(config)) if (stage.name, stage.key) in wanted]
        if len(stages) < len(wanted):
            raise ConfigError(
                "the sweep was planned with other input files or another version of the code",
                where=self.file,
                got=f"{len(wanted) - len(stages)} stages of {name} have another content hash now",
                fix="give the sweep command again",
            )
        return Unit(name, record["shared"], config, stages, tuple(record["needs"]))


def recorded_config(record: dict[str, Any]) -> Config:
    """The configuration of a recorded unit; keys that are newer than the record get their defaults."""
    return build_config(record["config"], where=record["name"])


def _compared(config: Config) -> dict[str, Any]:
    """Every setting that may not change, by dotted key."""
    flat: dict[str, Any] = {}

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(inner, f"{key}.{name}" if key else name)
        else:
            flat[key] = value

    visit(config.model_dump(mode="json", exclude=NOT_COMPARED), "")
    return flat


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n       ".join(lines[:SHOWN] + more)
