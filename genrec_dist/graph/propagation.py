"""LightGCN's propagation over a partition: halo rows exchanged, neighbours summed, layers averaged.

With A the adjacency matrix of the undirected user-item graph and d the degrees, the normalised matrix
B = D^-1/2 A D^-1/2 is symmetric, and so is the operator P = (1 + B + ... + B^K) / (K + 1). Its backward pass is
therefore itself, applied to the gradient: no transposed matrix, no scattered additions, no layer kept in memory, on
any number of workers.

Source: He et al. (2020), LightGCN, equations 3 and 8 (alpha_k = 1 / (K + 1)).
"""

from __future__ import annotations

import numpy as np
import torch

from genrec_dist.graph.exchange import request_rows, start_exchange
from genrec_dist.graph.layout import Partition, split_halo
from genrec_dist.graph.spmm import SpmmKind, make_neighbour_sum
from genrec_dist.training.worker import Worker


class Propagation:
    """P of one worker's rows. All workers have to make and call it together.

    Args:
        partition: what this worker owns; one partition a worker.
        worker: this process.
        num_layers: K.
        kind: kernel of the neighbour sums.
        overlap: sum over owned neighbours while halo rows are on their way. It needs a second matrix, and pays where
            sending takes time of its own: between hosts or GPUs.
    """

    def __init__(
        self, partition: Partition, worker: Worker, num_layers: int, kind: SpmmKind = "auto", overlap: bool = False
    ) -> None:
        self.worker, self.num_layers = worker, num_layers
        self.num_owned, self.num_halo = partition.num_owned, len(partition.halo)
        self.plan = request_rows(np.asarray(partition.halo), partition.offsets, worker)
        degrees = torch.from_numpy(np.array(partition.degrees, np.float64)).to(worker.device)
        self._inverse = torch.where(degrees > 0, 1 / degrees.clamp(min=1), 0.0)[:, None]
        self._buffer: torch.Tensor | None = None
        device, columns = worker.device, self.num_owned + self.num_halo
        self.overlap = overlap and worker.world_size > 1
        if not self.overlap:
            self.sum = make_neighbour_sum(partition.indptr, partition.indices, columns, device, kind)
            return
        inner, outer, boundary = split_halo(partition)
        self.sum = make_neighbour_sum(*inner, self.num_owned, device, kind)
        self.halo_sum = make_neighbour_sum(*outer, self.num_halo, device, kind)
        self.boundary = torch.from_numpy(boundary).to(device)

    @property
    def bytes_per_application(self) -> int:
        """Bytes that this worker receives in one application of P to float32 rows of width 1."""
        return 4 * self.num_halo * self.num_layers

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """P x; differentiable.

        Shapes:
            x: (rows owned, dim). returns: the same.
        """
        return _Apply.apply(x, self)

    @torch.no_grad()
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """P x without autograd."""
        inverse = self._inverse.to(x.dtype)
        root = inverse.sqrt()
        rows = self._rows(x)
        own = rows[: self.num_owned]
        torch.mul(x, root, out=own)
        total = x.clone()
        for layer in range(self.num_layers):
            summed = self._neighbours(rows)  # D^1/2 times the next layer
            total.addcmul_(summed, root)
            if layer + 1 < self.num_layers:
                torch.mul(summed, inverse, out=own)
        return total.div_(self.num_layers + 1)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """Work space: owned rows, then halo rows."""
        shape = (self.num_owned + self.num_halo, x.shape[1])
        if self._buffer is None or self._buffer.shape != shape or self._buffer.dtype != x.dtype:
            self._buffer = x.new_zeros(shape)
        return self._buffer

    def _neighbours(self, rows: torch.Tensor) -> torch.Tensor:
        own, halo = rows[: self.num_owned], rows[self.num_owned :]
        if self.worker.world_size == 1:
            return self.sum(rows)
        sending = start_exchange(own.index_select(0, self.plan.send_rows), halo, self.plan)
        if not self.overlap:
            sending.wait()
            return self.sum(rows)
        summed = self.sum(own)
        sending.wait()
        return summed.index_add_(0, self.boundary, self.halo_sum(halo))


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, propagation: Propagation) -> torch.Tensor:
        ctx.propagation = propagation
        return propagation.apply(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return ctx.propagation.apply(grad.contiguous()), None
