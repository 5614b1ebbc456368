"""One thread beside the main one: the disk, or the CPU, works while something else computes.

- `ReadAhead`: reads what is needed next; holds one thing at most
- `WorkBehind`: does a job while the caller goes on; holds one job at most

What fails in the thread is raised in the caller's; leaving the `with` block ends the thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

import torch

Read = TypeVar("Read")


class _Beside:
    """A thread that ends with the `with` block; it computes with as many threads as its maker."""

    def __init__(self, name: str) -> None:
        threads = torch.get_num_threads()
        self._executor = ThreadPoolExecutor(1, name, lambda: torch.set_num_threads(threads))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)


class ReadAhead(_Beside, Generic[Read]):
    """Reads one thing ahead of the one that is in use.

    Args:
        read: gets something by its name; runs in the thread, or in the caller's for what was not
            begun.
    """

    def __init__(self, read: Callable[[str], Read]) -> None:
        super().__init__("read-ahead")
        self._read = read
        self._begun: tuple[str, Future[Read]] | None = None

    def begin(self, name: str) -> None:
        """Start to read something that `take` will surely be asked for; nothing if one is held."""
        if self._begun is None:
            self._begun = name, self._executor.submit(self._read, name)

    def take(self, name: str) -> Read:
        """What was read, waiting for its end; raises what reading raised."""
        if self._begun is None or self._begun[0] != name:
            return self._read(name)
        future, self._begun = self._begun[1], None
        return future.result()


class WorkBehind(_Beside):
    """Does one job after the other while the caller goes on."""

    def __init__(self) -> None:
        super().__init__("work-behind")
        self._job: Future[None] | None = None

    def wait(self) -> None:
        """Wait for the last job; raise what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def submit(self, job: Callable[[], None]) -> None:
        """Begin a job once the one before is done; raise what that one raised."""
        self.wait()
        self._job = self._executor.submit(job)
