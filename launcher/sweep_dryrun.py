"""`genrec sweep --dry-run`: every run with its size, cost and time, and the stages built once. Writes nothing."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from genrec_dist.studies.scaling.plan import without_placements
from launcher.console import show_whole
from launcher.dryrun import bytes_text, scaled
from launcher.run import is_finished
from launcher.screen import duration
from launcher.sweep import Sweep, needs_of
from launcher.sweep_machine import GIB, Machine, Need, wants_gpu
from launcher.sweep_sizes import TrialSize, size_trials
from launcher.sweep_state import is_complete

APART = 4
COLUMNS = ("run", "state", "parameters", "non-embedding", "layers", "FLOPs", "memory", "GPU", "cores", "steps", "time")


def show_sweep(
    sweep: Sweep, store: Path, machines: list[Machine], parallel: int, probe: bool, console: Console
) -> None:
    """Print the plan of a sweep.

    Args:
        sweep: what would run.
        store: artifact store, need not exist.
        machines: where; without a cluster asked, this one.
        parallel: most units at once; 0: as many as fit.
        probe: time real steps here.
        console: where to.

    Raises:
        ClusterError: the largest trial fits nowhere.
    """
    sizes = size_trials(sweep.plan, store)
    needs = needs_of(sweep, sizes, machines, parallel)
    times = probe_times(sizes, needs) if probe else {}
    console.print(
        f"[bold]{escape(sweep.plan.name)}[/]: dry run, nothing is started; {len(sizes)} trials; "
        f"store {escape(str(store))}",
        soft_wrap=True,
    )
    _show_shared(sweep, store, console)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for place, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if place > 1 else "left", no_wrap=True)
    for size in sizes:
        table.add_row(*map(escape, _row(sweep, size, needs[size.trial.name], times.get(size.trial.name))))
    show_whole(table, console)
    on_gpu = wants_gpu(sweep.config, machines)
    _show_totals(sizes, times, on_gpu, console)
    notes = {note: None for size in sizes for note in size.notes}
    if on_gpu:
        notes["memory is of a GPU, training and validation; with the context of a process it decides the share"] = None
    for note in notes:
        console.print(f"note: {escape(note)}", style="dim", soft_wrap=True)


def _show_shared(sweep: Sweep, store: Path, console: Console) -> None:
    users: dict[tuple[str, str], int] = defaultdict(int)
    for trial in sweep.plan.trials:
        for stage in without_placements(trial.stages):
            users[stage.name, stage.key] += 1
    console.print("[bold]built once, for several trials[/]")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("stage", "action", "trials", "key", "seed"):
        table.add_column(name, justify="right" if name == "trials" else "left")
    for unit in (unit for unit in sweep.plan.units if unit.shared):
        for stage in unit.stages:
            action = "reuse" if is_finished(stage, store) else "build"
            seed = str(stage.settings.get("seed", ""))
            table.add_row(escape(stage.title), action, str(users[stage.name, stage.key]), stage.key, seed)
    show_whole(table, console)
    console.print()


def _row(sweep: Sweep, size: TrialSize, need: Need, seconds: float | None) -> list[str]:
    trial = size.trial
    done = is_complete(sweep.folder.run(trial.name, False), trial.keys)
    cells = [trial.name, "complete" if done else "new" if trial.name in sweep.new else "to run"]
    if size.loop is None:
        return [*cells, *[""] * 7]
    cells += [f"{size.parameters[name]:,}" for name in ("total", "non_embedding", "layers")]
    memory = bytes_text(size.memory(need.gpu > 0) or 0.0)
    cells += [scaled(size.flops, "FLOP"), memory, f"{need.gpu:.2f}" if need.gpu else ""]
    cells += [str(need.cores), f"{size.loop.batches.total_steps:,}", duration(seconds) if seconds is not None else ""]
    return cells


def _show_totals(sizes: list[TrialSize], times: dict[str, float], on_gpu: bool, console: Console) -> None:
    if all(size.loop is None for size in sizes):
        return
    largest = max(size.memory(on_gpu) or 0.0 for size in sizes)
    console.print(
        f"\nFLOPs in all: {scaled(sum(size.flops for size in sizes), 'FLOP')}; largest: "
        f"{largest / GIB:.2f} GiB a worker; all epochs counted, early stopping mostly ends a training before",
        soft_wrap=True,
    )
    if times:
        console.print(
            f"time of the trials' steps one after the other: {duration(sum(times.values()))}, from steps timed here; "
            "validations, evaluation and the shared stages come on top",
            soft_wrap=True,
        )


def probe_times(sizes: list[TrialSize], needs: dict[str, Need]) -> dict[str, float]:
    """Seconds of each trial's steps, by FLOPs from steps timed at two depths of each arm, well apart where possible."""
    from genrec_dist.studies.scaling.probe import StepTimes, make_material, seconds_of_step

    by_arm: dict[str, list[TrialSize]] = defaultdict(list)
    for size in sizes:
        if size.loop is not None:
            by_arm[size.trial.arm].append(size)
    found: dict[str, float] = {}
    for members in by_arm.values():
        first = min(members, key=lambda size: size.trial.depth)
        deeper = [size for size in members if size.trial.depth >= APART * first.trial.depth]
        second = min(deeper, key=_step_flops) if deeper else max(members, key=lambda size: size.trial.depth)
        ordered = sorted({_step_flops(size): size for size in (first, second)}.items())
        assert first.counts is not None
        material = make_material(first.counts, first.codebook, first.trial.config.identifiers.num_clusters, first.width)
        seconds = [
            seconds_of_step(size.trial.config, size.section, material, needs[size.trial.name].cores)
            for _, size in ordered
        ]
        line = StepTimes(tuple(flops for flops, _ in ordered), tuple(seconds))
        for size in members:
            assert size.loop is not None
            found[size.trial.name] = line.of(_step_flops(size)) * size.loop.batches.total_steps
    return found


def _step_flops(size: TrialSize) -> float:
    assert size.loop is not None
    return size.loop.size.training_flops * size.loop.batches.batch_size
