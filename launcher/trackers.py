"""Where the curves of trainings go besides the run's own files: TensorBoard event files, MLflow, Weights & Biases.

A tracker gets (stage, step, scalars) and writes them; it may raise, and whoever calls it drops it then. MLflow and W&B
are opt-in, by the `tracking` section, and imported only then.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.config import Config, TrackingConfig
from genrec_dist.errors import ConfigError

MODULES = {"mlflow": "mlflow", "wandb": "wandb"}


class Tracker(Protocol):
    """One destination."""

    name: str

    def log(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """Scalars of one training at one step."""

    def close(self, finished: bool) -> None:
        """Nothing more comes."""


def check_tracking(settings: TrackingConfig) -> None:
    """Refuse a tracker whose package is not installed, before anything starts.

    Raises:
        ConfigError: with the extra that brings it.
    """
    for key, module in MODULES.items():
        if getattr(settings, key) is not None and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"the package of this tracker is not installed: {module}",
                where=f"tracking.{key}",
                got=getattr(settings, key),
                fix="pip install 'genrec_dist[tracking]', or leave the key out",
            )


def make_trackers(config: Config, run: Path, warn: Callable[[str, BaseException], None]) -> list[Tracker]:
    """The trackers that the configuration names; one that cannot start is told to `warn` and left out.

    Args:
        config: of the run.
        run: its folder.
        warn: (tracker, error).
    """
    settings, made = config.tracking, []
    wanted: dict[str, Callable[[], Tracker]] = {}
    if settings.tensorboard:
        wanted["tensorboard"] = lambda: TensorBoard(run)
    if settings.mlflow is not None:
        wanted["mlflow"] = lambda: MlFlow(config, run)
    if settings.wandb is not None:
        wanted["wandb"] = lambda: Wandb(config, run)
    for name, make in wanted.items():
        try:
            made.append(make())
        except Exception as error:
            warn(name, error)
    return made


class TensorBoard:
    """Event files in `tensorboard/<stage>/` of the run folder."""

    name = "tensorboard"

    def __init__(self, run: Path) -> None:
        self.folder = run / "tensorboard"
        self.writers: dict[str, Any] = {}

    def log(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        if stage not in self.writers:
            from tensorboardX import SummaryWriter

            self.writers[stage] = SummaryWriter(str(self.folder / stage.replace(" ", "_")), flush_secs=10)
        for name, value in scalars.items():
            self.writers[stage].add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        for writer in self.writers.values():
            writer.close()


class MlFlow:
    """One MLflow run for a run folder, continued by a later call; its id is kept beside the curves."""

    name = "mlflow"

    def __init__(self, config: Config, run: Path) -> None:
        uri = str(config.tracking.mlflow)
        if uri.startswith("file:"):  # MLflow 3 keeps file stores, but wants to be asked
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        file = run / "tracking" / "mlflow.json"
        if file.is_file():
            self.id = read_json(file)["run_id"]
            self.client.update_run(self.id, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name("genrec")
        number = experiment.experiment_id if experiment else self.client.create_experiment("genrec")
        self.id = self.client.create_run(number, run_name=config.name).info.run_id
        for key, value in (("method", config.method), ("seed", config.seed), ("folder", run)):
            self.client.log_param(self.id, key, str(value))
        write_json(file, {"run_id": self.id, "uri": uri})

    def log(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        from mlflow.entities import Metric

        prefix = stage.replace(" ", "_")
        now = int(time.time() * 1000)
        metrics = [Metric(f"{prefix}/{name}".replace("@", "_at_"), value, now, step) for name, value in scalars.items()]
        self.client.log_batch(self.id, metrics)

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "FAILED")


class Wandb:
    """One W&B run for a run folder, continued by a later call."""

    name = "wandb"

    def __init__(self, config: Config, run: Path) -> None:
        import wandb

        file = run / "tracking" / "wandb.json"
        known = read_json(file)["run_id"] if file.is_file() else None
        folder = run / "tracking"
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=config.tracking.wandb,
            name=config.name,
            id=known,
            resume="allow" if known else None,
            mode="offline" if config.tracking.offline else "online",
            dir=str(folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )
        if known is None:
            write_json(file, {"run_id": self.run.id, "project": config.tracking.wandb})
        self._defined: set[str] = set()

    def log(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        prefix = stage.replace(" ", "_")
        if prefix not in self._defined:  # every training counts its own steps
            self.run.define_metric(f"{prefix}/step")
            self.run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
            self._defined.add(prefix)
        self.run.log({f"{prefix}/step": step} | {f"{prefix}/{name}": value for name, value in scalars.items()})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
