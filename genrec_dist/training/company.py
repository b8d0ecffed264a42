"""Several hosts under torchrun and one command: rank 0 leads and builds the stages, the others follow its trainings.

The leader announces each training through torchrun's own store as JSON: a function by its name in `FUNCTIONS`, the
stage's folders, settings. A follower calls nothing that is not in that table, and reads no pickle. All ranks join one
process group and run the function. When a rank dies, torchrun starts all of them again; the new leader goes on from the
artifacts and checkpoints, and what an earlier round left in the store is told apart by the round's name.

The folders must be the same on every host. The network must be trusted: PyTorch's store and collectives ask for no
password.
"""

from __future__ import annotations

import importlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from genrec_dist.cluster import worker_threads
from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import ClusterError, GenrecError, TrainingError
from genrec_dist.pipeline import StageContext
from genrec_dist.training import attempts
from genrec_dist.training.entry import WorkerFunction, run_reporting
from genrec_dist.training.worker import plain_worker, setup_torch

FUNCTIONS = {
    "train_fusion": "genrec_dist.collaborative.stage",
    "train_sharded_fusion": "genrec_dist.collaborative.stage",
    "train_lightgcn": "genrec_dist.collaborative.lightgcn_stage",
    "train_rqvae": "genrec_dist.identifiers.rqvae_training",
    "train_generator": "genrec_dist.generator.stage",
    "train_gpt": "genrec_dist.generator.gpt_stage",
    "train_sasrec": "genrec_dist.baselines.sasrec",
    "train_hstu": "genrec_dist.baselines.hstu_stage",
    "rank_together": "genrec_dist.evaluation.stage",
}
MEET_SECONDS = 900.0
POLL_SECONDS = 0.1
_met: Company | None = None


def world_size() -> int:
    """Ranks that torchrun started with this command; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def company() -> Company:
    """This process's company; met on the first call."""
    global _met
    _met = _met or Company()
    return _met


class Company:
    """The ranks of one round of torchrun.

    Args:
        place: store, rank and number of ranks; default: torchrun's.

    Raises:
        ClusterError: not all of them came within `MEET_SECONDS`.
    """

    def __init__(self, place: tuple[Any, int, int] | None = None) -> None:
        found: tuple[Any, int, int] = place or next(rendezvous("env://"))
        self.store, self.rank, self.size = found
        self.told = 0
        self.round = self._welcome() if self.rank == 0 else self._greet()

    def lead(self, function: WorkerFunction, context: StageContext, settings: dict) -> None:
        """Have every rank run the function, and wait.

        Raises:
            GenrecError: as raised by the function on any rank.
            TrainingError: a rank died.
            Preempted: the training was asked to stop, and has saved.
        """
        attempts.prepare(context)
        if self.restarts() and self.told == 0:
            context.event(
                "training_restarted", cause="error", kind="failure", attempt=self.restarts() + 1, by="torchrun"
            )
        self._tell({"do": "run", "function": name_of(function), "settings": settings, "context": _packed(context)})
        try:
            self._take_part(function, context, settings)
        except GenrecError:
            raise
        except Exception as error:
            time.sleep(1.0)  # the rank at fault may be a little later
            typed = attempts.typed_failure(context)
            if typed is not None:
                raise typed from error
            raise TrainingError(
                "training failed on the ranks of torchrun",
                where=context.title,
                got=f"{type(error).__name__}: {attempts.last_line(error)}",
                fix="torchrun --max-restarts=N starts all ranks again, from the last checkpoint",
            ) from error

    def dismiss(self, exit_code: int) -> None:
        """Tell the followers to leave with this code."""
        self._tell({"do": "leave", "exit_code": exit_code})
        _leave_group()

    def follow(self) -> int:
        """Take part in what the leader announces until it says to leave; its exit code.

        Raises:
            GenrecError, Preempted: of a training, as on the leader.
        """
        while True:
            order = self._hear()
            if order["do"] == "leave":
                _leave_group()
                return int(order["exit_code"])
            self._take_part(function_of(order["function"]), _unpacked(order["context"]), order["settings"])

    def restarts(self) -> int:
        """Rounds of this torchrun before the present one."""
        return int(self.store.get("genrec/rounds")) - 1

    def _take_part(self, function: WorkerFunction, context: StageContext, settings: dict) -> None:
        worker = plain_worker(context.runtime, self.round)
        setup_torch(worker, worker_threads(context.runtime))
        run_reporting(function, worker, context, settings)
        worker.barrier()

    def _tell(self, order: dict) -> None:
        self.store.set(f"genrec/{self.round}/{self.told}", json.dumps(order))
        self.told += 1

    def _hear(self) -> dict:
        key = f"genrec/{self.round}/{self.told}"
        while not self.store.check([key]):  # `wait` would not let Python's signal handlers run
            time.sleep(POLL_SECONDS)
        self.told += 1
        return json.loads(self.store.get(key))

    def _welcome(self) -> str:
        """Name the round and wait until every follower of it has the name.

        What a follower of an earlier round wrote is still there; it is welcomed and does not answer.
        """
        name = uuid.uuid4().hex
        self.store.add("genrec/rounds", 1)
        missing, welcomed = set(range(1, self.size)), set()
        deadline = time.monotonic() + MEET_SECONDS
        while missing:
            for rank in sorted(missing):
                hello = f"genrec/hello/{rank}"
                if self.store.check([hello]) and (who := self.store.get(hello).decode()) not in welcomed:
                    welcomed.add(who)
                    self.store.set(f"genrec/welcome/{who}", name)
                if self.store.check([f"genrec/{name}/here/{rank}"]):
                    missing.discard(rank)
            _wait_for(f"ranks {sorted(missing)}", deadline)
        return name

    def _greet(self) -> str:
        who = uuid.uuid4().hex
        self.store.set(f"genrec/hello/{self.rank}", who)
        deadline = time.monotonic() + MEET_SECONDS
        while not self.store.check([f"genrec/welcome/{who}"]):
            _wait_for("rank 0", deadline)
        name = self.store.get(f"genrec/welcome/{who}").decode()
        self.store.set(f"genrec/{name}/here/{self.rank}", "1")
        return name


def name_of(function: WorkerFunction) -> str:
    """Name under which followers know a function.

    Raises:
        ClusterError: it is not one of `FUNCTIONS`.
    """
    name = getattr(function, "__name__", "")
    if name not in FUNCTIONS or function is not function_of(name):
        raise ClusterError(
            "this stage cannot run on several hosts",
            where="torchrun",
            got=name or function,
            expected=f"one of {sorted(FUNCTIONS)}",
            fix="use Ray, or one host",
        )
    return name


def function_of(name: str) -> WorkerFunction:
    """The function of a name that the leader sent.

    Raises:
        ClusterError: it is not one of `FUNCTIONS`.
    """
    if name not in FUNCTIONS:
        raise ClusterError(
            "the leader asks for an unknown function",
            where="torchrun",
            got=name,
            expected=f"one of {sorted(FUNCTIONS)}",
            fix="install the same version on every host",
        )
    return getattr(importlib.import_module(FUNCTIONS[name]), name)


def _packed(context: StageContext) -> dict[str, Any]:
    return {
        "out": str(context.out.resolve()),
        "inputs": {role: str(folder.resolve()) for role, folder in context.inputs.items()},
        "runtime": context.runtime.model_dump(mode="json"),
        "key": context.key,
        "title": context.title,
        "events_file": None if context.events_file is None else str(context.events_file.resolve()),
    }


def _unpacked(packed: dict[str, Any]) -> StageContext:
    return StageContext(
        out=Path(packed["out"]),
        inputs={role: Path(folder) for role, folder in packed["inputs"].items()},
        runtime=RuntimeConfig.model_validate(packed["runtime"]),
        key=packed["key"],
        title=packed["title"],
        events_file=None if packed["events_file"] is None else Path(packed["events_file"]),
    )


def _wait_for(whom: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise ClusterError(
            "not all ranks of torchrun have come",
            where="torchrun",
            got=f"no word from {whom} in {MEET_SECONDS:.0f} s",
            fix="start the same command on every host",
        )
    time.sleep(POLL_SECONDS)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
