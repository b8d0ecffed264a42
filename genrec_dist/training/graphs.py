"""Training steps as CUDA graphs: the host starts one graph instead of hundreds of kernels.

A small generator on a large GPU waits for launches, not for arithmetic. Two kinds of graphs are captured: forward and
backward of a part of a batch, one for each shape of its tensors, and the update (clipping and fused Adam), one for all.
The host fills the captured inputs, seeds the random numbers and starts them; it waits for nothing. Where a loss is not
finite the update is held back on the device.

Gradients are views of one flat buffer: one kernel clears it, one takes its norm, one all-reduce averages it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from genrec_dist.config import OptimConfig
from genrec_dist.training.engine import TorchEngine, autocast, set_learning_rate
from genrec_dist.training.losses import LossMeter
from genrec_dist.training.worker import Worker

EAGER_STEPS = 3
"""Parts of one shape that run without a graph first: libraries, the compiler and the optimiser make their state."""
COMPILE_AFTER = 20
"""Parts of one shape before it is compiled, which takes a minute."""
MOST_GRAPHS = 32


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Any]
    losses: dict[str, torch.Tensor]


class GraphEngine(TorchEngine):
    """`TorchEngine` on a GPU, its steps captured. What cannot be captured runs as usual, with a warning.

    Args:
        model: its forward must not make the host wait (no boolean indexing, no `.item()`).
        config: optimiser; not with float16, whose loss scale the host decides on.
        worker: this process, on a CUDA device.
        compiled: fuse the forward and backward by `torch.compile` before capturing them.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, worker: Worker, compiled: bool = False) -> None:
        super().__init__(model, config, worker, on_device=True)
        sizes = [p.numel() for p in self.parameters]
        self.flat = torch.zeros(sum(sizes), device=worker.device)
        self._bind()
        self._call: Callable[[Any], dict[str, torch.Tensor]] = torch.compile(model) if compiled else model
        self._held = torch.zeros((), device=worker.device)
        self._optimizer_holds(self._held)
        self._seen: dict[tuple, int] = {}
        self._parts: dict[tuple, _Captured] = {}
        self._update: torch.cuda.CUDAGraph | None = None
        self._updates = 0
        self.eager_steps = EAGER_STEPS + (COMPILE_AFTER if compiled else 0)
        self._pool = torch.cuda.graph_pool_handle()
        self.capturing = True

    def _bind(self) -> None:
        """Make every gradient a view of the flat buffer."""
        start = 0
        for p in self.parameters:
            p.grad = self.flat[start : start + p.numel()].view_as(p)
            start += p.numel()

    def _optimizer_holds(self, flag: torch.Tensor) -> None:
        self.optimizer.found_inf = flag  # type: ignore[attr-defined]  # fused Adam leaves its step out where it is 1

    def advance(
        self, batches: Sequence[Any], learning_rate: float, meter: LossMeter, begin: Callable[[int], None]
    ) -> None:
        """See `Engine`; the host waits for nothing."""
        set_learning_rate(self.optimizer, learning_rate)
        found = []
        for index, batch in enumerate(batches):
            begin(index)
            found.append(self._part(batch, len(batches)))
        if self.worker.world_size > 1:
            self.worker.sum(self.flat).div_(self.worker.world_size)
        meter.add(found)
        self._held.copy_(meter.bad)
        self._finish()

    # Forward and backward

    def _part(self, batch: dict[str, Any], parts: int) -> dict[str, torch.Tensor]:
        """Losses of a part; its gradients are added to the flat buffer."""
        key = (parts, *_signature(batch))
        captured = self._parts.get(key)
        if captured is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if not self.capturing or self._seen[key] <= self.eager_steps or len(self._parts) >= MOST_GRAPHS:
                # The last of these calls compile, where that is wanted: a rare shape is not worth it.
                call = self._call if self._seen[key] > self.eager_steps - EAGER_STEPS else self.model
                return self._forward_backward(batch, parts, call)
            captured = self._capture(batch, parts)
            if captured is None:
                return self._forward_backward(batch, parts, self.model)
            self._parts[key] = captured
        for name, value in captured.inputs.items():
            if isinstance(value, torch.Tensor):
                value.copy_(batch[name], non_blocking=True)
        captured.graph.replay()
        return {name: value.clone() for name, value in captured.losses.items()} if parts > 1 else captured.losses

    def _forward_backward(
        self, batch: dict[str, Any], parts: int, call: Callable[[Any], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        with autocast(self.config, self.worker.device):
            losses = call(batch)
        (losses["loss"] / parts if parts > 1 else losses["loss"]).backward()
        return {name: value.detach() for name, value in losses.items()}

    def _capture(self, batch: dict[str, Any], parts: int) -> _Captured | None:
        inputs = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
        before = self.flat.clone()  # gradients of the step's earlier parts
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.worker.device)
        torch.cuda.empty_cache()  # what eager steps left cached would not serve the graphs' own pool
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                losses = self._forward_backward(inputs, parts, self._call)
        except RuntimeError as error:
            self._give_up(error, before)
            return None
        return _Captured(graph, inputs, losses)

    def _give_up(self, error: RuntimeError, gradients: torch.Tensor) -> None:
        self.capturing = False
        torch.cuda.synchronize(self.worker.device)
        # The generator still takes itself to be in the capture, and would refuse to draw: it gets a state of its own.
        fresh = torch.Generator(self.worker.device)
        torch.cuda.default_generators[self.worker.device.index or 0].graphsafe_set_state(fresh.graphsafe_get_state())
        self._bind()
        self.flat.copy_(gradients)  # of the captured part nothing ran, but a backward pass may have been cut short
        warnings.warn(f"training steps are not captured as CUDA graphs: {error}", stacklevel=2)

    # Update

    def _finish(self) -> None:
        if self._update is None and self.capturing and self._updates >= EAGER_STEPS:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize(self.worker.device)
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._apply()
            self._update = graph
        self._updates += 1
        if self._update is not None:
            self._update.replay()
        else:
            self._apply()

    def _apply(self) -> None:
        if self.config.clip_norm:  # as torch.nn.utils.clip_grad_norm_
            norm = torch.linalg.vector_norm(self.flat)
            self.flat.mul_((self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.flat.zero_()

    def step(self, learning_rate: float) -> None:
        """As the other engines', without the meter: for use outside of the loop."""
        set_learning_rate(self.optimizer, learning_rate)
        self._finish()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        if self.worker.world_size > 1 and self.last_part:
            self.worker.sum(self.flat).div_(self.worker.world_size)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """In place where a captured update reads already."""
        if self._update is None:
            super().load(state)
            return
        raise RuntimeError("a training whose steps were captured cannot be loaded into; make a new engine")


def _signature(batch: dict[str, Any]) -> tuple:
    """What must be the same for a captured graph to serve: shapes and types of tensors, values of the rest."""
    return tuple(
        (name, tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else (name, value)
        for name, value in sorted(batch.items())
    )
