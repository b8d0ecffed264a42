"""Engine for models with tables sharded by owner: every worker has its own rows, and all have the dense layers.

Gradients of a sharded row arrive at its owner through `graph.exchange`; only those of the dense layers are reduced.
Adam runs on each worker's rows alone, over the touched rows only where gradients are sparse. A checkpoint holds each
row under its name (the global node or item), so it can be read by any number of workers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from genrec_dist.config import OptimConfig, RuntimeConfig
from genrec_dist.errors import CheckpointError, ConfigError
from genrec_dist.training.engine import (
    MOMENTS,
    State,
    StepByParts,
    autocast,
    average_gradients,
    make_optimizer,
    set_learning_rate,
    step_tensor,
)
from genrec_dist.training.worker import Worker

ROWS = "rows"


def refuse_deepspeed(runtime: RuntimeConfig) -> None:
    """Refuse settings that this engine would ignore.

    Raises:
        ConfigError: DeepSpeed or a ZeRO stage is asked for.
    """
    if runtime.engine == "deepspeed" or runtime.zero_stage:
        raise ConfigError(
            "tables that are sharded by owner are not trained by DeepSpeed",
            where="runtime.engine",
            got=f"{runtime.engine}, runtime.zero_stage {runtime.zero_stage}",
            expected="auto or torch, runtime.zero_stage 0: each worker has its own rows and their optimiser state",
            fix="leave both at their defaults",
        )


class ShardedModel(Protocol):
    """What a model says of its sharded parameters."""

    is_sparse: bool

    def sharded_rows(self) -> dict[str, np.ndarray]:
        """Parameter name -> global name of each of its rows here, (rows,) int64."""


class ShardedEngine(StepByParts):
    """Plain PyTorch around a model with sharded tables.

    Args:
        model: an nn.Module that is a `ShardedModel`.
        config: optimiser; weight decay only with dense gradients.
        worker: this process.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, worker: Worker) -> None:
        self.model, self.config, self.worker = model, config, worker
        self.rows = model.sharded_rows()  # type: ignore[operator]
        named = dict(model.named_parameters())
        self.tables = {name: named[name] for name in self.rows}
        self.dense = {name: p for name, p in named.items() if name not in self.rows and p.requires_grad}
        self.optimizers: list[torch.optim.Optimizer] = []
        if model.is_sparse:
            self.optimizers.append(torch.optim.SparseAdam(list(self.tables.values()), lr=config.learning_rate))
            if self.dense:
                self.optimizers.append(make_optimizer(self.dense.values(), config))
        else:
            parameters = [*self.tables.values(), *self.dense.values()]
            self.optimizers.append(make_optimizer(parameters, config))
        for p in self.dense.values():
            worker.broadcast(p.detach())

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        with autocast(self.config, self.worker.device):
            return self.model(batch)

    def backward(self, loss: torch.Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(list(self.dense.values()), self.worker)
        for table in self.tables.values():
            if table.grad is None:
                table.grad = torch.zeros_like(table)
            if self.worker.world_size > 1:
                table.grad /= self.worker.world_size

    def step(self, learning_rate: float) -> None:
        if self.config.clip_norm:
            self._clip()
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, learning_rate)
            optimizer.step()

    def _clip(self) -> None:
        """Clip by the norm of the whole gradient, every worker's rows included."""
        tables = [_values(table) for table in self.tables.values()]
        dense = [p.grad for p in self.dense.values() if p.grad is not None]
        zero = torch.zeros((), device=self.worker.device)
        squares = self.worker.sum(sum((v.square().sum() for v in tables), zero))
        squares = sum((v.square().sum() for v in dense), squares)
        factor = (self.config.clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in (*tables, *dense):
            gradient.mul_(factor)

    def _slot(self, parameter: nn.Parameter) -> dict:
        for optimizer in self.optimizers:
            if parameter in optimizer.state:
                return optimizer.state[parameter]
        return {}

    def state(self) -> State:
        """This worker's rows with their names, the dense parameters, and Adam's moments of both."""
        state: State = {f"{ROWS}/{name}": torch.from_numpy(rows) for name, rows in self.rows.items()}
        for name, p in (self.tables | self.dense).items():
            state[f"model/{name}"] = p.detach().cpu().clone()
            slot = self._slot(p)
            for moment in MOMENTS if slot else ():
                state[f"{moment}/{name}"] = slot[moment].detach().cpu().clone()
            if slot:
                state["step"] = torch.as_tensor(float(slot["step"]))
        return state

    def best(self) -> State:
        """This worker's part of the parameters alone."""
        state: State = {f"{ROWS}/{name}": torch.from_numpy(rows) for name, rows in self.rows.items()}
        return state | {f"model/{n}": p.detach().cpu().clone() for n, p in (self.tables | self.dense).items()}

    def load_parts(self, files: list[Path]) -> None:
        """Take this worker's rows, and the dense parameters, from the parts of a checkpoint.

        Raises:
            CheckpointError: a row is in no part.
        """
        found = self._read(files, ["model", *MOMENTS])
        with safe_open(files[0], "pt") as file:
            step = file.get_tensor("step") if "step" in file.keys() else None  # noqa: SIM118
        for name, p in (self.tables | self.dense).items():
            with torch.no_grad():
                p.copy_(found[f"model/{name}"])
            if f"{MOMENTS[0]}/{name}" in found and step is not None:
                optimizer = next(o for o in self.optimizers if any(p is q for g in o.param_groups for q in g["params"]))
                own = isinstance(optimizer, torch.optim.SparseAdam)
                optimizer.state[p] = {"step": int(step) if own else step_tensor(step, p, optimizer)} | {
                    moment: found[f"{moment}/{name}"].to(p.device, copy=True) for moment in MOMENTS
                }

    def read_best(self, files: list[Path]) -> State:
        """This worker's part of the best parameters, from the parts of a checkpoint."""
        return self._read(files, ["model"]) | {f"{ROWS}/{n}": torch.from_numpy(r) for n, r in self.rows.items()}

    def load_best(self, best: State) -> None:
        """Put the best parameters into the model."""
        with torch.no_grad():
            for name, p in (self.tables | self.dense).items():
                p.copy_(best[f"model/{name}"])

    def _read(self, files: list[Path], kinds: list[str]) -> State:
        """Tensors of this worker: of each table the rows that it owns now, wherever they were."""
        found: State = {}
        missing = {name: np.ones(len(rows), bool) for name, rows in self.rows.items()}
        for file in files:
            with safe_open(file, "pt") as part:
                names = set(part.keys())
                for name in self.dense:
                    for key in (f"{kind}/{name}" for kind in kinds):
                        if key in names and key not in found:
                            found[key] = part.get_tensor(key).clone()  # of a view into a file that will be removed
                for name, rows in self.rows.items():
                    there = part.get_tensor(f"{ROWS}/{name}").numpy()
                    order = np.argsort(there)
                    place = np.searchsorted(there[order], rows)
                    place = order[np.minimum(place, max(len(there) - 1, 0))] if len(there) else np.zeros(0, np.int64)
                    here = np.flatnonzero(there[place] == rows) if len(there) else np.zeros(0, np.int64)
                    missing[name][here] = False
                    for key in (f"{kind}/{name}" for kind in kinds):
                        if key in names and len(here):
                            values = part.get_tensor(key)
                            target = found.setdefault(key, values.new_zeros(len(rows), *values.shape[1:]))
                            target[here] = values[place[here]]
        for name, gone in missing.items():
            if gone.any():
                raise CheckpointError(
                    "checkpoint has not all rows of a table",
                    where=files[0].parent if files else "checkpoint",
                    got=f"{int(gone.sum())} rows of {name} are in no part",
                    expected="every row",
                    fix="remove the checkpoint folder; an older one is used, or training starts anew",
                )
            for kind in kinds:  # a worker without rows
                found.setdefault(f"{kind}/{name}", torch.zeros_like(self.tables[name], device="cpu"))
        return found


def _values(table: nn.Parameter) -> torch.Tensor:
    """The gradient's values, those of the touched rows where it is sparse; changing them changes the gradient."""
    assert table.grad is not None
    if not table.grad.is_sparse:
        return table.grad
    table.grad = table.grad.coalesce()
    return table.grad._values()
