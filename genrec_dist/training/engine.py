"""What the train loop needs of an engine, and the plain PyTorch one.

Every engine shows the same small face to the loop and the same canonical state (full parameters and Adam moments by
name), so a checkpoint written under one engine, ZeRO stage or world size loads under another. DeepSpeed's is in
`deepspeed_engine`, that of tables sharded by owner in `sharded`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from genrec_dist.config import OptimConfig, RuntimeConfig
from genrec_dist.training.losses import LossMeter, LossScale
from genrec_dist.training.worker import Worker

State = dict[str, torch.Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """A model and its optimiser, as the train loop sees them."""

    model: nn.Module

    def advance(
        self, batches: Sequence[Any], learning_rate: float, meter: LossMeter, begin: Callable[[int], None]
    ) -> None:
        """One step over this worker's parts of a global batch, their losses added to the meter.

        `begin` is called with the number of each part before its forward pass; it seeds the random numbers. With a loss
        that is not finite the step is not applied: either this raises what `LossMeter.refuse` raises, or the update is
        held back on the device, and every later one, until the loop asks the meter.
        """

    def whole(self) -> contextlib.AbstractContextManager:
        """While it is open every worker holds all parameters; all workers have to open it together."""

    def state(self) -> State:
        """Parameters and persistent buffers ('model/...'), moments ('exp_avg/...', 'exp_avg_sq/...') and 'step', on the
        CPU."""

    def best(self) -> State:
        """What a validation that was the best so far is of: parameters and persistent buffers, on the CPU."""

    def load(self, state: State) -> None: ...

    def weights(self) -> list[torch.Tensor]:
        """What this worker holds of the trained parameters: tensors that steps change in place."""

    def weights_changed(self) -> None:
        """Called when `weights` were written to: brings the model's parameters up to date. On all workers together."""


class StepByParts(ABC):
    """`advance` out of forward, backward and step, for engines whose host looks at each loss."""

    last_part = True

    def advance(
        self, batches: Sequence[Any], learning_rate: float, meter: LossMeter, begin: Callable[[int], None]
    ) -> None:
        """See `Engine`."""
        found = []
        for index, batch in enumerate(batches):
            begin(index)
            self.begin_part(index + 1 == len(batches))
            losses = self.forward(batch)
            self.backward(losses["loss"] / len(batches) if len(batches) > 1 else losses["loss"])
            found.append({name: value.detach() for name, value in losses.items()})
        meter.add(found)
        meter.refuse()
        self.step(learning_rate)

    def begin_part(self, last: bool) -> None:
        """Called before each part of a batch."""
        self.last_part = last

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        """Losses of a part."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add its gradients to those of the parts before."""

    @abstractmethod
    def step(self, learning_rate: float) -> None:
        """Update, and forget the gradients."""

    def whole(self) -> contextlib.AbstractContextManager:
        """See `Engine`: they always do."""
        return contextlib.nullcontext()


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, on_device: bool = False
) -> torch.optim.Optimizer:
    """Fused Adam or AdamW; weight decay only on matrices, never on norms and biases.

    Args:
        parameters: those without gradient are left out.
        config: kind, rate, decay.
        on_device: the learning rate is a tensor, and a step can be held back by the optimiser's `found_inf`, both on
            the parameters' device: what CUDA graphs need.
    """
    trained = [p for p in parameters if p.requires_grad]
    decay, plain = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    groups = [g for g in groups if g["params"]]
    rate = torch.tensor(config.learning_rate, device=trained[0].device) if on_device else config.learning_rate
    return kind(groups, lr=rate, fused=True, capturable=on_device)  # type: ignore[arg-type]


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """In place where it is a tensor, which a captured step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def step_tensor(step: torch.Tensor, parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Adam's step count as the optimiser keeps it: fused ones beside the parameter."""
    return step.detach().clone().float().to(parameter.device if optimizer.defaults.get("fused") else "cpu")


def precision_of(config: OptimConfig, device: torch.device) -> torch.dtype:
    """Type of products that the configuration and the device want."""
    name = config.precision
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(config: OptimConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast to the wanted type, nothing for float32."""
    dtype = precision_of(config, device)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def average_gradients(parameters: list[nn.Parameter], worker: Worker) -> None:
    """Average gradients over the workers by one flat all-reduce."""
    if worker.world_size == 1 or not parameters:
        return
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = worker.sum(_flatten_dense_tensors(grads)) / worker.world_size
    for p, grad in zip(parameters, _unflatten_dense_tensors(flat, grads)):
        p.grad = grad


def named_trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that get gradients, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's state: what it learns without gradients."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


class TorchEngine(StepByParts):
    """Plain PyTorch; gradients are averaged over the workers by one flat all-reduce."""

    def __init__(self, model: nn.Module, config: OptimConfig, worker: Worker, on_device: bool = False) -> None:
        self.model, self.config, self.worker = model, config, worker
        self.optimizer = make_optimizer(model.parameters(), config, on_device)
        self.parameters = [p for _, p in named_trained(model)]
        self.scale = LossScale.of(precision_of(config, worker.device))
        for tensor in model.state_dict().values():
            worker.broadcast(tensor)

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        with autocast(self.config, self.worker.device):
            return self.model(batch)

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.scale.value if self.scale else loss).backward()
        if self.last_part:
            average_gradients(self.parameters, self.worker)

    def step(self, learning_rate: float) -> None:
        set_learning_rate(self.optimizer, learning_rate)
        if self.scale is None or self.scale.unscale([p.grad for p in self.parameters if p.grad is not None]):
            if self.config.clip_norm:
                nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def best(self) -> State:
        return model_state(self.model)

    def weights(self) -> list[torch.Tensor]:
        return [p.data for p in self.parameters]

    def weights_changed(self) -> None:
        """See `Engine`: the weights are the parameters."""

    def state(self) -> State:
        return torch_state(self.model, self.optimizer) | (self.scale.state() if self.scale else {})

    def load(self, state: State) -> None:
        load_torch_state(self.model, self.optimizer, state)
        if self.scale:
            self.scale.load(state)


def buffer_state(model: nn.Module) -> State:
    """Persistent buffers by name, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in _buffers(model).items()}


def model_state(model: nn.Module) -> State:
    """Trained parameters and persistent buffers of a model that lies here whole, by name, on the CPU."""
    return buffer_state(model) | {name: p.detach().cpu().clone() for name, p in named_trained(model)}


def as_model(tensors: State) -> State:
    """Names as they are in a state."""
    return {f"model/{name}": tensor for name, tensor in tensors.items()}


def load_buffers(model: nn.Module, state: State) -> None:
    """Persistent buffers of a state into the model."""
    for name, value in _buffers(model).items():
        value.copy_(state[f"model/{name}"])


def torch_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Canonical state of a model and an optimiser that both lie here whole."""
    state = as_model(model_state(model))
    for name, p in named_trained(model):
        slot = optimizer.state.get(p)
        if slot:
            for moment in MOMENTS:
                state[f"{moment}/{name}"] = slot[moment].detach().cpu().clone()
            state["step"] = torch.as_tensor(float(slot["step"]))
    return state


def load_torch_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """What `torch_state` gave, into the model and the optimiser."""
    load_buffers(model, state)
    for name, p in named_trained(model):
        with torch.no_grad():
            p.copy_(state[f"model/{name}"])
        if f"{MOMENTS[0]}/{name}" in state:  # a parameter that never had a gradient has none
            optimizer.state[p] = {"step": step_tensor(state["step"], p, optimizer)} | {
                m: state[f"{m}/{name}"].to(p.device, copy=True) for m in MOMENTS
            }


def make_engine(model: nn.Module, config: OptimConfig, worker: Worker, runtime: RuntimeConfig) -> Engine:
    """The engine that the configuration names; 'auto' is DeepSpeed under Ray and torch in a plain process."""
    if runtime.activation_checkpointing:
        from genrec_dist.generator.transformer import checkpoint_activations

        checkpoint_activations(model)
    wanted = runtime.engine
    if wanted == "auto":
        wanted = "deepspeed" if runtime.backend == "ray" else "torch"
    if wanted == "deepspeed":
        from genrec_dist.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, config, worker, runtime)
    mode = "graph" if runtime.step_mode == "auto" else runtime.step_mode
    if worker.device.type == "cuda" and mode != "eager" and config.precision != "fp16":
        from genrec_dist.training.graphs import GraphEngine

        return GraphEngine(model, config, worker, compiled=mode == "compile")
    return TorchEngine(model, config, worker)
