"""One function over many batches: on a GPU all batches have one shape and replay one CUDA graph.

The first batch fixes the shape. A smaller one is filled up with copies of its last row, whose results are cut off; one
too large for the memory of the GPU is halved until it fits, and every later batch is cut likewise. Nothing waits for
the GPU, so the function must not either; what cannot be captured is called as it is, as is everything on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch

Batch = dict[str, torch.Tensor]


class BatchRunner:
    """A function that maps the rows of a batch to rows of results, each on its own.

    Args:
        function: on a GPU of fixed shapes and without a wait for the device. What it reads beside the batch must stay
            where it is in memory, as long as the runner lives.
        device: where the batches are.
        fixed: give all batches one shape; None: on a GPU.
        graphs: capture the function in a CUDA graph where there is a GPU.
    """

    def __init__(
        self,
        function: Callable[[Batch], Batch],
        device: torch.device,
        *,
        fixed: bool | None = None,
        graphs: bool = True,
    ) -> None:
        self.function, self.device = function, device
        on_gpu = device.type == "cuda"
        self.fixed = on_gpu if fixed is None else fixed
        self.graphs = graphs and on_gpu and self.fixed
        self.size = 0
        """Rows of every call of the function; 0 before the first batch, and where the shape is not fixed."""
        self.problem: str | None = None
        """Why there is no graph though one was wanted."""
        self._inputs: Batch = {}
        self._outputs: Batch = {}
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """Results of a batch, in tensors of their own.

        Shapes:
            batch: every tensor has one row a user. Returns likewise.
        """
        if not self.fixed:
            return self.function(batch)
        rows = _rows(batch)
        if not self.size:
            self._prepare(batch)
        parts = [self._call(_slice(batch, start, start + self.size)) for start in range(0, rows, self.size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _call(self, batch: Batch) -> Batch:
        rows = _rows(batch)
        for name, held in self._inputs.items():
            held[:rows].copy_(batch[name])
            if rows < self.size:
                held[rows:].copy_(batch[name][-1:].expand_as(held[rows:]))
        if self._graph is None:
            return _slice(self.function(self._inputs), 0, rows)
        self._graph.replay()
        return {name: held[:rows].clone() for name, held in self._outputs.items()}

    def _prepare(self, batch: Batch) -> None:
        """Find the number of rows that fits, and capture."""
        size = _rows(batch)
        while True:
            self._inputs = {name: tensor[:size].clone() for name, tensor in batch.items()}
            try:
                self._warm_up()
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = -(-size // 2)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.size = size
        if self.graphs:
            self._capture()

    def _warm_up(self) -> None:
        """Kernels are compiled and libraries set up before a capture; the memory that it took is given back."""
        if self.device.type != "cuda":
            self.function(self._inputs)
            return
        torch.cuda.empty_cache()  # a graph that is gone leaves its memory reserved, of no use to any other
        side = _side_stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2 if self.graphs else 1):
                self.function(self._inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.empty_cache()

    def _capture(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # thread_local: NCCL's watchdog asks for events on a thread of its own, which must not end the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self.function(self._inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that breaks leaves its own stream in place
            self.problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            logging.getLogger(__name__).warning("no CUDA graph, batches run kernel by kernel: %s", self.problem)
            return
        self._graph = graph


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all warm-ups: cuBLAS keeps a workspace, on an H100 of 32 MiB, for each stream that it has seen."""
    return torch.cuda.Stream(device)


class DeviceProgress:
    """Says how many rows are done as the device gets there, without a wait.

    Args:
        say: called with the number of rows.
        device: where the work is queued.
    """

    def __init__(self, say: Callable[[int], None], device: torch.device) -> None:
        self.say, self.device = say, device
        self._queued: list[tuple[int, torch.cuda.Event]] = []

    def queued(self, done: int) -> None:
        """Work up to `done` rows is queued; report what is finished."""
        if self.device.type != "cuda":
            self.say(done)
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._queued.append((done, event))
        finished = 0
        while self._queued and self._queued[0][1].query():
            finished = self._queued.pop(0)[0]
        if finished:
            self.say(finished)

    def finish(self) -> None:
        """Wait for the rest, reporting it."""
        for done, event in self._queued:
            event.synchronize()
            self.say(done)
        self._queued.clear()


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _slice(batch: Batch, start: int, stop: int) -> Batch:
    return {name: tensor[start:stop] for name, tensor in batch.items()}
