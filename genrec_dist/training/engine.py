"""Engines that turn a model and an optimiser into a training step: plain torch, or DeepSpeed ZeRO.

Both show the same small face to the loop and the same canonical state (full parameters and Adam moments by
name), so a checkpoint written under one engine, ZeRO stage or world size loads under another.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from genrec_dist.config import OptimConfig, RuntimeConfig
from genrec_dist.training.worker import Worker

State = dict[str, torch.Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """What the train loop needs."""

    model: nn.Module

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self, learning_rate: float) -> None: ...

    def state(self) -> State:
        """Parameters and persistent buffers ('model/...'), moments ('exp_avg/...', 'exp_avg_sq/...') and 'step', on the
        CPU."""

    def load(self, state: State) -> None: ...


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Adam or AdamW; weight decay only on matrices, never on norms and biases."""
    trained = [p for p in parameters if p.requires_grad]
    decay, plain = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    groups = [g for g in groups if g["params"]]
    return kind(groups, lr=config.learning_rate, fused=device.type == "cuda" or None)


def autocast(config: OptimConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 autocast where the configuration and the device want it."""
    wanted = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


def average_gradients(parameters: list[nn.Parameter], worker: Worker) -> None:
    """Average gradients over the workers by one flat all-reduce."""
    if worker.world_size == 1 or not parameters:
        return
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = worker.sum(_flatten_dense_tensors(grads)) / worker.world_size
    for p, grad in zip(parameters, _unflatten_dense_tensors(flat, grads)):
        p.grad = grad


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's state: what it learns without gradients."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


class TorchEngine:
    """Plain PyTorch; gradients are averaged over the workers by one flat all-reduce."""

    def __init__(self, model: nn.Module, config: OptimConfig, worker: Worker) -> None:
        self.model, self.config, self.worker = model, config, worker
        self.optimizer = make_optimizer(model.parameters(), config, worker.device)
        for tensor in model.state_dict().values():
            worker.broadcast(tensor)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with autocast(self.config, self.worker.device):
            return self.model(batch)

    def backward(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients([p for _, p in _named(self.model)], self.worker)

    def step(self, learning_rate: float) -> None:
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def state(self) -> State:
        return _torch_state(self.model, self.optimizer)

    def load(self, state: State) -> None:
        _load_torch_state(self.model, self.optimizer, state)


def _buffer_state(model: nn.Module) -> State:
    return {f"model/{name}": value.detach().cpu().clone() for name, value in _buffers(model).items()}


def _load_buffers(model: nn.Module, state: State) -> None:
    for name, value in _buffers(model).items():
        value.copy_(state[f"model/{name}"])


def _torch_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    state: State = _buffer_state(model)
    for name, p in _named(model):
        state[f"model/{name}"] = p.detach().cpu().clone()
        slot = optimizer.state.get(p)
        if slot:
            for moment in MOMENTS:
                state[f"{moment}/{name}"] = slot[moment].detach().cpu().clone()
            state["step"] = torch.as_tensor(float(slot["step"]))
    return state


def _load_torch_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    _load_buffers(model, state)
    for name, p in _named(model):
        with torch.no_grad():
            p.copy_(state[f"model/{name}"])
        if f"{MOMENTS[0]}/{name}" in state:  # a parameter that never had a gradient has none
            on_device = p.device if optimizer.defaults.get("fused") else torch.device("cpu")
            optimizer.state[p] = {"step": state["step"].clone().float().to(on_device)} | {
                m: state[f"{m}/{name}"].to(p.device, copy=True) for m in MOMENTS
            }


class DeepSpeedEngine:
    """DeepSpeed ZeRO stage 0 to 2 around the same optimiser.

    Args:
        zero_stage: 0 replicates, 1 shards optimiser states, 2 gradients too.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, worker: Worker, zero_stage: int) -> None:
        if worker.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        if os.access(sys.prefix, os.W_OK):  # compiled operators belong to this environment, not to the user
            os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
        import deepspeed

        # Operators that this machine could compile: none, else a first run on a CPU compiles one that only inference
        # uses, for minutes.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        self.config, self.worker, self.zero_stage = config, worker, zero_stage
        backend = "nccl" if worker.device.type == "cuda" else "gloo"
        os.environ.setdefault("LOCAL_RANK", str(worker.device.index or 0))  # DeepSpeed insists on it
        if worker.world_size == 1 and not dist.is_initialized():  # a plain process: a group of its own
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(model.parameters(), config, worker.device),
            config=deepspeed_settings(config, worker.world_size, zero_stage),
            dist_init_required=False,
        )
        self.model = self.engine.module
        if zero_stage:
            self._make_moments()

    def _make_moments(self) -> None:
        """ZeRO makes and links the Adam moments at its first step; a checkpoint may be read or written before it."""
        for p in self.optimizer.single_partition_of_fp32_groups:
            on_device = p.device if self._base.defaults.get("fused") else torch.device("cpu")
            self._base.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=on_device)} | {
                moment: torch.zeros_like(p) for moment in MOMENTS
            }
        self.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _base(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with autocast(self.config, self.worker.device):
            return self.engine(batch)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()

    def state(self) -> State:
        if not self.zero_stage:
            return _torch_state(self.model, self._base)
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: State = _buffer_state(self.model)
        for name, p in _named(self.model):
            state[f"model/{name}"] = safe_get_full_fp32_param(p).detach().cpu().clone()
            for moment in MOMENTS:
                state[f"{moment}/{name}"] = safe_get_full_optimizer_state(p, moment).detach().cpu().clone()
        step = next(iter(self._base.state.values()))["step"]
        return state | {"step": torch.as_tensor(float(step))}

    def load(self, state: State) -> None:
        if not self.zero_stage:
            _load_torch_state(self.model, self._base, state)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        _load_buffers(self.model, state)
        for name, p in _named(self.model):
            with torch.no_grad():
                p.copy_(state[f"model/{name}"])
            safe_set_full_fp32_param(p, state[f"model/{name}"].to(p.device))
            for moment in MOMENTS if "step" in state else ():
                safe_set_full_optimizer_state(p, state[f"{moment}/{name}"].to(p.device), moment)
        for slot in self._base.state.values():
            if "step" in slot and "step" in state:
                slot["step"] = state["step"].clone().float().to(torch.as_tensor(slot["step"]).device)


def deepspeed_settings(config: OptimConfig, world_size: int, zero_stage: int) -> dict[str, Any]:
    """DeepSpeed's own JSON for this optimiser and world size."""
    return {
        # Only for DeepSpeed's own bookkeeping: the loop cuts the batches, and the last of an epoch is smaller.
        "train_micro_batch_size_per_gpu": max(1, config.batch_size // world_size),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }


def make_engine(model: nn.Module, config: OptimConfig, worker: Worker, runtime: RuntimeConfig) -> Engine:
    """The engine that the configuration names; 'auto' is DeepSpeed under Ray and torch in a plain process."""
    wanted = runtime.engine
    if wanted == "auto":
        wanted = "deepspeed" if runtime.backend == "ray" else "torch"
    if wanted == "deepspeed":
        return DeepSpeedEngine(model, config, worker, runtime.zero_stage)
    return TorchEngine(model, config, worker)
