"""Sums over neighbours: the sparse matrix product of graph convolution, with ones in the matrix.

Three kernels behind one call: DGL's (the fastest on a CPU), torch's CSR, and a Triton kernel on a GPU. All take the
rows of a partition as they lie on disk; none keeps anything for a backward pass (see propagation.py).
"""

from __future__ import annotations

import warnings
from typing import Literal, Protocol

import numpy as np
import torch

from genrec_dist.errors import ConfigError

SpmmKind = Literal["auto", "dgl", "torch", "triton"]
INT32_MAX = np.iinfo(np.int32).max


class NeighbourSum(Protocol):
    """Row r of the result is the sum of the rows `indices[indptr[r]:indptr[r + 1]]` of the input."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


def make_neighbour_sum(
    indptr: np.ndarray, indices: np.ndarray, num_columns: int, device: torch.device, kind: SpmmKind = "auto"
) -> NeighbourSum:
    """Kernel over a fixed sparse matrix.

    Args:
        indptr: rows.
        indices: columns.
        num_columns: rows of the input.
        device: where it computes.
        kind: 'auto' takes triton on a GPU, dgl on a CPU where DGL works, else torch.

    Shapes:
        indptr: (num_rows + 1,) integers. indices: (nnz,) integers below num_columns.

    Raises:
        ConfigError: a kernel that the device does not have.
        ClusterError: dgl is asked for and does not work.
    """
    kind = choose_kind(kind, device)
    if kind == "torch":
        return TorchSum(indptr, indices, num_columns, device)
    if kind == "triton":
        from genrec_dist.graph.spmm_triton import TritonSum

        return TritonSum(indptr, indices, device)
    return DglSum(indptr, indices, num_columns)


def choose_kind(kind: SpmmKind, device: torch.device) -> SpmmKind:
    """What 'auto' means on a device; a named kernel is checked.

    Raises:
        ConfigError: a kernel that the device does not have.
    """
    if kind == "auto":
        if device.type == "cuda":
            return "triton"
        from genrec_dist.graph.dgl_tools import dgl_problem

        return "torch" if dgl_problem() else "dgl"
    if (kind == "triton") != (device.type == "cuda") and kind != "torch":
        raise ConfigError(
            "kernel does not run on this device",
            where="runtime.spmm",
            got=f"{kind} on {device.type}",
            expected="dgl or torch on a CPU, triton or torch on a GPU",
            fix="set it to auto",
        )
    return kind


def as_index(array: np.ndarray, largest: int) -> torch.Tensor:
    """Index array in 32 bits where they suffice."""
    return torch.from_numpy(np.array(array, np.int32 if largest <= INT32_MAX else np.int64))


class DglSum:
    """DGL's CPU kernel.

    Raises:
        ClusterError: DGL does not work.
    """

    def __init__(self, indptr: np.ndarray, indices: np.ndarray, num_columns: int) -> None:
        from genrec_dist.graph.dgl_tools import load_dgl

        dgl = load_dgl()
        largest = max(len(indices), num_columns)
        pointer, index = as_index(indptr, largest), as_index(indices, largest)
        self._graph = dgl.heterograph(
            {("column", "in", "row"): ("csc", (pointer, index, index.new_empty(0)))},
            num_nodes_dict={"column": num_columns, "row": len(indptr) - 1},
        )
        self._kernel = dgl.ops.copy_u_sum

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernel(self._graph, x)


class TorchSum:
    """torch's CSR matrix; on a GPU cuSPARSE."""

    def __init__(self, indptr: np.ndarray, indices: np.ndarray, num_columns: int, device: torch.device) -> None:
        largest = max(len(indices), num_columns)
        self._pointer = as_index(indptr, largest).to(device)
        self._index = as_index(indices, largest).to(device)
        self._shape = (len(indptr) - 1, num_columns)
        self._matrix: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not len(self._index):  # MKL refuses an empty matrix
            return x.new_zeros(self._shape[0], x.shape[1])
        if self._matrix is None or self._matrix.dtype != x.dtype:
            ones = torch.ones(len(self._index), dtype=x.dtype, device=x.device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that CSR is in beta, once a process
                self._matrix = torch.sparse_csr_tensor(
                    self._pointer, self._index, ones, self._shape, check_invariants=False
                )
        return self._matrix @ x
