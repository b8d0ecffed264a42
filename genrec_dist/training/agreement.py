"""One worker's error on all workers, so that they end together and say the same."""

from __future__ import annotations

import json

import torch

from genrec_dist.errors import GenrecError, TrainingError
from genrec_dist.training.attempts import describe_error, rebuild_error
from genrec_dist.training.worker import Worker


def agree_on_error(error: BaseException | None, worker: Worker) -> BaseException | None:
    """The error of the lowest rank that has one, on every worker; None when there is none.

    All workers have to call this together. That rank gets its error back as it is.
    """
    if worker.world_size == 1:
        return error
    own = b"" if error is None else json.dumps(describe_error(_typed(error, worker))).encode()
    lengths = torch.zeros(worker.world_size, dtype=torch.int64, device=worker.device)
    lengths[worker.rank] = len(own)
    worker.sum(lengths)
    if not lengths.any():
        return None
    first = int(lengths.nonzero()[0])
    text = torch.zeros(int(lengths[first]), dtype=torch.uint8, device=worker.device)
    if worker.rank == first:
        text.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    worker.sum(text)
    return error if worker.rank == first else rebuild_error(json.loads(bytes(text.cpu().numpy())))


def _typed(error: BaseException, worker: Worker) -> GenrecError:
    if isinstance(error, GenrecError):
        return error
    return TrainingError("a worker failed", where=f"worker {worker.rank}", got=f"{type(error).__name__}: {error}")
