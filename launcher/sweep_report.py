"""The report of a sweep, complete or not: its trials read from their run folders, and what the fits need to be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from genrec_dist.artifacts.files import write_json
from genrec_dist.config import Config
from genrec_dist.studies.scaling.ladder import DEPTH_KEYS
from genrec_dist.studies.scaling.read import read_trial
from genrec_dist.studies.scaling.sweep_folder import SweepFolder, recorded_config
from genrec_dist.studies.scaling.trials import Trial
from launcher.streams import captured


def write_sweep_report(folder: SweepFolder) -> Path:
    """Write trials.json, report.html, report.json and figures/ into the sweep's folder; libraries print to its log.

    Raises:
        DataError: numbers that no fit can be made of.
    """
    with captured(folder.path / "logs" / "report.log"):
        from genrec_dist.studies.scaling.report import write_report

        record = folder.read()
        trials = read_trials(folder, record)
        write_json(folder.path / "trials.json", [asdict(trial) for trial in trials])
        return write_report(trials, folder.path, record["title"], facts_of(record))


def read_trials(folder: SweepFolder, record: dict) -> list[Trial]:
    """Every trial of the record; points of a grid are arms of their own, so that no two trials are one place."""
    units = [unit for unit in record["units"] if not unit["shared"]]
    varied = sorted({key for unit in units for key in unit["settings"]})
    trials = []
    for unit in units:
        arm = f"{unit['arm']} {unit['point']}".strip()
        trial = read_trial(folder.run(unit["name"], False).path, arm, unit["depth"], varied)
        trials.append(replace(trial, seed=unit["seed"]))
    return trials


def facts_of(record: dict) -> dict[str, str]:
    """What the trials do not say of themselves, for the report's table of choices."""
    arms: dict[str, Config] = {}
    for unit in record["units"]:
        if not unit["shared"]:
            arms.setdefault(unit["arm"], recorded_config(unit))

    def told(tell: Callable[[Config], str]) -> str:
        """One text for all arms, or one an arm where they differ."""
        texts = {arm: tell(config) for arm, config in arms.items()}
        if len(set(texts.values())) == 1:
            return next(iter(texts.values()))
        return "; ".join(f"{arm}: {text}" for arm, text in texts.items())

    grid = sorted({key for unit in record["units"] if not unit["shared"] for key in unit["varied"]})
    return {
        "schedule": told(_schedule),
        "data": told(lambda config: config.catalog.path or config.catalog.source),
        "order": told(lambda config: config.catalog.order),
        "early stopping": told(_stopping),
        "tuning": f"varied in this sweep: {', '.join(grid)}" if grid else "none in this sweep",
        "ladder": record["ladder"],
    }


def _optim(config: Config):
    return getattr(config, DEPTH_KEYS[config.method].split(".")[0]).optim


def _schedule(config: Config) -> str:
    optim = _optim(config)
    return f"{optim.schedule} after {optim.warmup_steps} steps of warm-up, at most {optim.epochs} epochs"


def _stopping(config: Config) -> str:
    optim = _optim(config)
    return f"after {optim.patience} validations without a better NDCG@10, one each {optim.evaluate_every} epochs"
