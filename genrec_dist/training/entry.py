"""What one worker of several does around its function: say that it is there, leave when given up, say how it failed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from genrec_dist.errors import TrainingError
from genrec_dist.pipeline import StageContext
from genrec_dist.training.attempts import Cause, note_failure, register
from genrec_dist.training.fence import Fence
from genrec_dist.training.worker import Worker

WorkerFunction = Callable[[Worker, StageContext, dict], None]


def run_reporting(
    function: WorkerFunction, worker: Worker, context: StageContext, settings: dict, node: str = ""
) -> None:
    """Run the function; an exception is left in a file for the process that launched, and raised.

    It has to be raised: a worker that merely returned would leave the others waiting in their next collective. A worker
    of Ray, whose `node` is given, ends itself when another has taken its place.
    """
    registered = register(worker, context, node)
    with Fence(*registered) if node else nullcontext():
        try:
            function(worker, context, settings)
        except Exception as error:
            note_failure(context, worker.rank, error)
            raise


def exhausted(context: StageContext, cause: Cause) -> TrainingError:
    """The error of a training whose budget is spent."""
    budget = "runtime.max_preemptions" if cause.kind == "preemption" else "runtime.max_failures"
    return TrainingError(
        "training failed on the workers, retries exhausted",
        where=context.title,
        got=f"{cause.name}: {cause.text}",
        expected=f"at most {budget} times",
        fix="see the run's logs; the same command continues from the last checkpoint",
    )
