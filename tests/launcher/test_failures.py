"""Which error and exit code an exception stands for, however deep Ray has wrapped it."""

from __future__ import annotations

import errno
import signal

import pytest
import ray.exceptions
import torch
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from genrec_dist.errors import CheckpointError, ClusterError, DataError
from launcher.failures import explain

DATA = DataError("bad rows", where="x", fix="look")


def ray_task_error(cause: Exception) -> Exception:
    return ray.exceptions.RayTaskError("f", "remote traceback", cause).as_instanceof_cause()


def chained(inner: Exception) -> Exception:
    try:
        try:
            raise inner
        except Exception as error:
            raise RuntimeError("outer") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    "error",
    [
        DATA,
        ray_task_error(DATA),
        chained(DATA),
        chained(ray_task_error(DATA)),
        WorkerGroupError("workers", {0: UserExceptionWithTraceback(DATA, "tb")}),
        ControllerError(ray_task_error(DATA)),
    ],
    ids=lambda e: type(e).__name__,
)
def test_typed_errors_are_found(error: Exception) -> None:
    found = explain(error)
    assert (found.exit_code, found.kind) == (3, "DataError")
    assert found.text == "bad rows\n  where: x\n  fix: look"


def test_the_outer_of_two_typed_errors_counts() -> None:
    outer = CheckpointError("no checkpoint")
    outer.__cause__ = DATA
    assert explain(outer).exit_code == 5


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkerGroupError("workers", {0: UserExceptionWithTraceback(ValueError("x"), "tb")}), 5),
        (ray.exceptions.LocalRayletDiedError("gone"), 4),
        (ray.exceptions.OutOfMemoryError("killed"), 4),
        (OSError(errno.ENOSPC, "No space left on device"), 4),
        (MemoryError(), 4),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 42.00 MiB."), 4),
        (torch.AcceleratorError("CUDA error: out of memory"), 4),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 4),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), 1),
        (ClusterError("no GPU"), 4),
        (ray_task_error(ValueError("x")), 1),
        (OSError(errno.EACCES, "no"), 1),
        (SystemExit(0), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else None,
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert explain(error).exit_code == code


def test_a_signal_explains_whatever_came_of_it() -> None:
    assert explain(SystemExit(0), signal.SIGINT).exit_code == 130
    assert explain(ray.exceptions.RaySystemError("x"), signal.SIGTERM).exit_code == 75
