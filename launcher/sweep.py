"""`genrec sweep`: plan, checks, machines, and the parts put together.

What runs where is in `sweep_pool` and `sweep_ray`, what a unit is in `genrec_dist.studies.scaling.plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from genrec_dist import methods
from genrec_dist.cluster import ensure_ray, leave_ray
from genrec_dist.config import Config
from genrec_dist.errors import EXIT_TRAINING, ConfigError
from genrec_dist.studies.scaling.leases import Leases, Owner
from genrec_dist.studies.scaling.plan import Plan, PlannedTrial, Unit, make_plan
from genrec_dist.studies.scaling.sweep_file import SweepFile, load_sweep
from genrec_dist.studies.scaling.sweep_folder import SweepFolder
from launcher.failures import Failure, Stopped
from launcher.run import check_batches
from launcher.signals import SignalWatch
from launcher.streams import captured
from launcher.sweep_machine import Machine, Need, need_of, refuse_too_large, shared_need, this_machine, wants_gpu
from launcher.sweep_pool import LocalPool, Pool
from launcher.sweep_ray import RayPool, child_command, cluster_machines
from launcher.sweep_report import write_sweep_report
from launcher.sweep_run import Outcome, Scheduler
from launcher.sweep_sizes import TrialSize, size_trials
from launcher.trackers import check_tracking

EXTENDABLE = {"depth": "depths", "seed": "seeds"}


@dataclass(frozen=True)
class Sweep:
    """A sweep that may start.

    Args:
        plan: resolved and checked.
        folder: runs/<sweep>.
        source: path of the sweep file.
        extended: depths and seeds beyond the file's.
        new: trials that this call adds.
    """

    plan: Plan
    folder: SweepFolder
    source: Path
    extended: dict[str, list[int]]
    new: list[str]

    @property
    def config(self) -> Config:
        """Of the first trial: its runtime is that of all, where the scheduler asks."""
        return self.plan.trials[0].config


def prepare(path: Path, name: str | None, settings: Sequence[str], extend: Sequence[str], runs: Path) -> Sweep:
    """Read, resolve and check a sweep; writes nothing.

    Args:
        path: sweep file.
        name: of the sweep; None: the file's.
        settings: 'key=value' for every arm.
        extend: 'depth=48', 'seed=3,4' or 'file'.
        runs: folder of all runs.

    Raises:
        ConfigError: something in it is wrong, or differs from what was begun under this name.
    """
    file = load_sweep(path)
    folder = SweepFolder(runs, name or path.stem)
    extended: dict[str, list[int]] = dict(folder.read()["extended"]) if folder.file.is_file() else {}
    for key, values in parse_extend(extend).items():
        extended[key] = [*extended.get(key, []), *(v for v in values if v not in extended.get(key, []))]
    wanted = extend_file(file, extended)
    plan = make_plan(folder.path.name, wanted, path.parent, methods.build_stages, check_batches, settings)
    for trial in plan.trials:
        check_tracking(trial.config.tracking)
    for key in ("backend", "ray_address"):
        different = {str(getattr(trial.config.runtime, key)) for trial in plan.trials}
        if len(different) > 1:
            raise ConfigError("one sweep runs in one place", where=f"runtime.{key}", got=sorted(different))
    return Sweep(plan, folder, path, extended, folder.refuse_change(plan, _welcome(extend, extended)))


def _welcome(extend: Sequence[str], extended: dict[str, list[int]]) -> Callable[[PlannedTrial], bool]:
    """Which new trials were asked for: all with 'file', else those of a depth or seed that was named."""
    if "file" in extend:
        return lambda trial: True
    depths, seeds = extended.get("depth", []), extended.get("seed", [])
    return lambda trial: trial.depth in depths or trial.seed in seeds


def parse_extend(texts: Sequence[str]) -> dict[str, list[int]]:
    """'depth=48,64' as numbers; 'file' adds none.

    Raises:
        ConfigError: neither.
    """
    found: dict[str, list[int]] = {}
    for text in texts:
        if text == "file":
            continue
        key, _, values = text.partition("=")
        parts = [part.strip() for part in values.split(",")]
        if key not in EXTENDABLE or not all(part.isdecimal() for part in parts):
            raise ConfigError("nothing to extend by", where="--extend", got=text, expected="depth=48, seed=3,4 or file")
        found[key] = found.get(key, []) + [int(part) for part in parts]
    return found


def extend_file(file: SweepFile, extended: dict[str, list[int]]) -> SweepFile:
    """The sweep file with more depths and seeds.

    Raises:
        ConfigError: more depths for a sweep that has none.
    """
    values = file.model_dump()
    for key, more in extended.items():
        own = values[EXTENDABLE[key]]
        if not own:
            raise ConfigError("the sweep has no ladder to extend", where="--extend", got=f"{key}={more}")
        values[EXTENDABLE[key]] = own + [value for value in more if value not in own]
    return SweepFile.model_validate(values)


@contextmanager
def place(config: Config, log: Path) -> Iterator[tuple[Any, list[Machine]]]:
    """The `ray` module (None without Ray) and the machines of the sweep; Ray is left at the end.

    Args:
        config: its runtime says where.
        log: gets what Ray prints.
    """
    runtime = config.runtime
    if runtime.backend == "local":
        yield None, [this_machine(runtime.device)]
        return
    try:
        with captured(log):
            ray = ensure_ray(runtime)
            machines = cluster_machines(ray, runtime.device)
        yield ray, machines
    finally:
        with captured(log):
            leave_ray()


def machines_for_plan(sweep: Sweep) -> list[Machine]:
    """Machines that a dry run reckons with: this one, for nothing is started and no cluster is asked."""
    return [this_machine(sweep.config.runtime.device)]


def needs_of(sweep: Sweep, sizes: list[TrialSize], machines: list[Machine], parallel: int) -> dict[str, Need]:
    """What each unit takes.

    Raises:
        ClusterError: the largest trial fits nowhere.
    """
    trainings = {size.trial.name: size.memory(False) for size in sizes}  # a batch of a validation is cut until it fits
    refuse_too_large(trainings, wants_gpu(sweep.config, machines), machines)
    needs = {}
    for size in sizes:
        config = size.trial.config
        needs[size.trial.name] = need_of(config, size.memory(wants_gpu(config, machines)), machines, parallel)
    return needs | {u.name: shared_need(u.config, machines[0]) for u in sweep.plan.units if u.shared}


def in_order(sweep: Sweep, sizes: list[TrialSize]) -> list[Unit]:
    """Shared units, then trials from the costliest on: the last to end are short, and one too large fails early."""
    costs = {size.trial.name: size.flops for size in sizes}
    shared = [unit for unit in sweep.plan.units if unit.shared]
    return shared + sorted((u for u in sweep.plan.units if not u.shared), key=lambda unit: -costs[unit.name])


def carry_out(
    sweep: Sweep, *, store: Path, parallel: int, retry_failed: bool, command: list[str], console: Console
) -> Outcome:
    """Run every trial that is not complete; failures of some stop none of the others.

    Args:
        sweep: what to run.
        store: artifact store.
        parallel: most units at once; 0: as many as fit.
        retry_failed: trials that failed in an earlier call are tried again.
        command: for the record.
        console: progress.

    Raises:
        Stopped: SIGINT or SIGTERM.
        ClusterError: no machine, or the largest trial fits on none.
    """
    folder, owner = sweep.folder, Owner.this_process()
    sizes = size_trials(sweep.plan, store)
    log = folder.path / "logs" / "sweep.log"
    with SignalWatch(), place(sweep.config, log) as (ray, machines):
        needs = needs_of(sweep, sizes, machines, parallel)
        folder.write(sweep.plan, sweep.extended, str(sweep.source), store, command)
        keys = {unit.name: {(stage.name, stage.key) for stage in unit.stages} for unit in sweep.plan.units}
        keys |= {trial.name: trial.keys for trial in sweep.plan.trials}
        scheduler = Scheduler(
            folder,
            store.resolve(),
            in_order(sweep, sizes),
            make_pool(sweep, ray, machines, needs, parallel, owner),
            Leases(folder.path / "claims", owner),
            lambda text: console.print(escape(text), soft_wrap=True),
            keys,
        )
        return scheduler.run(retry_failed)


def make_pool(
    sweep: Sweep, ray: Any, machines: list[Machine], needs: dict[str, Need], parallel: int, owner: Owner
) -> Pool:
    """Where the units run: children of this process, or Ray's tasks."""
    folder = sweep.folder.path

    def command(unit: Unit, runtime: dict[str, Any]) -> list[str]:
        return child_command(str(folder), unit.name, runtime)

    here = LocalPool(this_machine(sweep.config.runtime.device), needs, parallel, command, folder / "logs")
    if ray is None:
        return here
    here.runtime = {"ray_address": ray.get_runtime_context().gcs_address}
    return RayPool(ray, folder, needs, machines, parallel, here, owner.id)


def conclude(outcome: Outcome, sweep: Sweep, console: Console) -> None:
    """Report and last words.

    Raises:
        Stopped: with exit code 5, when trials failed or could not start.
    """
    trials = {trial.name for trial in sweep.plan.trials}
    done, failed = len(outcome.finished & trials), outcome.failed
    console.print(f"{done} of {len(trials)} trials complete", soft_wrap=True)
    if done:
        console.print(f"report: {escape(str(write_sweep_report(sweep.folder)))}", soft_wrap=True)
    if failed or outcome.blocked:
        listed = [f"{name}: {why}" for name, why in sorted(failed.items())]
        listed += [f"{name}: not started, {why} failed" for name, why in sorted(outcome.blocked.items())]
        text = "trials failed; all others are done\n  got: " + "\n       ".join(listed)
        text += "\n  fix: see their logs, then `genrec sweep` with --retry-failed"
        raise Stopped(Failure(EXIT_TRAINING, "TrialsFailed", text, sweep.folder.path / "logs"))
