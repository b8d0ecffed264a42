"""Batches made ahead of the step that needs them, by one background thread.

The batch of a step is a function of its number alone, so what comes out does not depend on timing. The function must
neither draw from torch's global generators nor take part in collectives: both belong to the training thread. Where the
samples are gathered on the device there is nothing to hide, nor on a CPU, whose cores the training has already (0.6 to
2 ms of a step of 240 on two of them): `depth` 0 makes each batch when it is asked for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Prefetcher(Generic[Batch]):
    """Batches of the steps start, start + 1, ..., stop - 1, in turn.

    Use as a context manager, or call `close`: the thread ends at the latest after the batch that it is making.

    Args:
        make: batch of a step.
        start, stop: first step, and the one behind the last.
        depth: batches that are made ahead at most; 0: no thread.

    Attributes:
        waited_seconds: time that `get` took so far: what data cost the training.
    """

    def __init__(self, make: Callable[[int], Batch], start: int, stop: int, depth: int = 2) -> None:
        self.make, self.stop, self.depth = make, stop, depth
        self.waited_seconds = 0.0
        self._next = start
        self._ready: deque[Batch] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if depth > 0 and start < stop:
            self._thread = threading.Thread(target=self._work, args=(start,), name="prefetch", daemon=True)
            self._thread.start()

    def _work(self, step: int) -> None:
        while step < self.stop:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self.depth)
                if self._closed:
                    return
            try:
                batch = self.make(step)
            except BaseException as error:  # raised again by `get` of this step, after the batches before it
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._ready.append(batch)
                self._changed.notify_all()
            step += 1

    def get(self, step: int) -> Batch:
        """Batch of a step, made by now or waited for.

        Raises:
            ValueError: another step than the next one, or closed.
            BaseException: what `make` raised for this step.
        """
        if self._closed or step != self._next or step >= self.stop:
            state = "closed" if self._closed else f"step {self._next} of {self.stop} is next"
            raise ValueError(f"step {step} asked for; {state}")
        begun = time.perf_counter()
        try:
            batch = self.make(step) if self._thread is None else self._take()
        finally:
            self.waited_seconds += time.perf_counter() - begun
        self._next += 1
        return batch

    def _take(self) -> Batch:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None)
            if self._ready:
                batch = self._ready.popleft()
                self._changed.notify_all()
                return batch
            assert self._error is not None
            raise self._error

    def __iter__(self) -> Iterator[Batch]:
        while self._next < self.stop:
            yield self.get(self._next)

    def close(self) -> None:
        """End the thread and forget what it made; more than once does no harm."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._ready.clear()

    def __enter__(self) -> Prefetcher[Batch]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
