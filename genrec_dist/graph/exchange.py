"""Rows of tables that are sharded by owner, moved between workers: the one communication primitive of the graph.

A plan says which of its rows a worker sends to whom and how many it gets from whom. `exchange` moves rows by a plan
and, in the backward pass, moves their gradients the other way, to the owners. Halo rows of a partition and the rows
of a batch's items differ only in how long their plan lives.

Knows nothing of graphs and models. Without a process group (one worker) nothing is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from genrec_dist.training.worker import Worker


@dataclass(frozen=True)
class RowPlan:
    """Who sends which rows to whom.

    Args:
        send_counts: rows this worker sends to each worker.
        receive_counts: rows it gets from each worker.

    Shapes:
        send_rows: (sum of send_counts,) int64, local rows, grouped by receiver.
    """

    send_rows: torch.Tensor
    send_counts: list[int]
    receive_counts: list[int]

    @property
    def num_received(self) -> int:
        return sum(self.receive_counts)


def request_rows(ids: np.ndarray | torch.Tensor, offsets: np.ndarray, worker: Worker) -> RowPlan:
    """Plan by which every worker gets the rows it names, in the order in which it names them.

    All workers have to call this together.

    Args:
        ids: new ids wanted, ascending, without repeats. Rows of its own may be among them.
        offsets: first new id of each worker's rows.
        worker: this process.

    Shapes:
        ids: (n,) int64. offsets: (world_size + 1,) int64.
    """
    mine = ids if isinstance(ids, torch.Tensor) else torch.from_numpy(np.array(ids, np.int64)).to(worker.device)
    if worker.world_size == 1:
        return RowPlan(mine, [len(mine)], [len(mine)])
    bounds = torch.from_numpy(offsets).to(worker.device)
    wanted = torch.diff(torch.searchsorted(mine, bounds)).tolist()
    asked = exchange_counts(wanted, worker)
    rows = mine.new_empty(sum(asked))
    dist.all_to_all_single(rows, mine, asked, wanted)
    return RowPlan(rows - int(offsets[worker.rank]), asked, wanted)


def exchange_counts(counts: list[int], worker: Worker) -> list[int]:
    """counts[p] of every worker p for this one."""
    sent = torch.tensor(counts, device=worker.device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received.tolist()


def gather_ids(ids: np.ndarray, worker: Worker) -> np.ndarray:
    """The ids of all workers, by worker, on every one of them.

    Shapes:
        ids: (n,) int64, n may differ from worker to worker.
    """
    if worker.world_size == 1:
        return ids
    counts = exchange_counts([len(ids)] * worker.world_size, worker)
    mine = torch.from_numpy(np.array(ids, np.int64)).to(worker.device)
    out = mine.new_empty(sum(counts))
    dist.all_to_all_single(out, mine.repeat(worker.world_size), counts, [len(ids)] * worker.world_size)
    return out.cpu().numpy()


class _Exchange(torch.autograd.Function):
    """Rows to their receivers; gradients back to their owners."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, plan: RowPlan) -> torch.Tensor:
        ctx.plan = plan
        return _all_to_all(rows, plan.receive_counts, plan.send_counts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _all_to_all(grad.contiguous(), ctx.plan.send_counts, ctx.plan.receive_counts), None


def _all_to_all(rows: torch.Tensor, receive: list[int], send: list[int]) -> torch.Tensor:
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(out, rows, receive, send)
    return out


def exchange(rows: torch.Tensor, plan: RowPlan, worker: Worker) -> torch.Tensor:
    """Send rows by a plan; differentiable.

    Shapes:
        rows: (len(plan.send_rows), ...). returns: (plan.num_received, ...).
    """
    if worker.world_size == 1:
        return rows
    return _Exchange.apply(rows, plan)


def fetch_rows(table: torch.Tensor, plan: RowPlan, worker: Worker) -> torch.Tensor:
    """Rows of a sharded table by a plan; gradients are added up at the owners.

    Shapes:
        table: (rows owned, dim). returns: (plan.num_received, dim).
    """
    return exchange(table.index_select(0, plan.send_rows), plan, worker)


def return_values(values: torch.Tensor, plan: RowPlan, worker: Worker) -> torch.Tensor:
    """Send something about each received row back to the row's owner; not differentiable.

    Shapes:
        values: (plan.num_received, ...). returns: (len(plan.send_rows), ...).
    """
    return values if worker.world_size == 1 else _all_to_all(values, plan.send_counts, plan.receive_counts)


def start_exchange(rows: torch.Tensor, out: torch.Tensor, plan: RowPlan) -> dist.Work:
    """Begin to send rows into `out`; not differentiable. Wait for the returned work before reading `out`."""
    return dist.all_to_all_single(out, rows, plan.receive_counts, plan.send_counts, async_op=True)
