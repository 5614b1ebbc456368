"""A forward that stops wherever it is told to, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class _Stop(BaseException):
    """Ends a waiting thread; a BaseException, so that no model code catches it."""


class Pass:
    """One batch's forward in a thread that runs only between `resume` and the next `wait`."""

    def __init__(self, index: int, forward: Callable[[], Any], threads: int) -> None:
        self.index, self._forward, self._threads = index, forward, threads
        self.unit: str | None = None  # the unit it waits for
        self.result: Any = None
        self.done = False
        self._error: BaseException | None = None
        self._stopped = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=f"batch-{index}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._stopped:
                torch.set_num_threads(self._threads)
                with torch.no_grad():  # not inference_mode: its tensors have no version counter
                    self.result = self._forward()
        except _Stop:
            pass
        except BaseException as error:
            self._error = error
        self.done = True
        self._back.release()

    def resume(self) -> None:
        """Let it run up to its next unit or its end; raise what it raised."""
        self.unit = None
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, unit: str) -> None:
        """Called in its own thread: sleep until `unit` is loaded."""
        self.unit = unit
        self._back.release()
        self._go.acquire()
        if self._stopped:
            raise _Stop

    def stop(self) -> None:
        """End its thread, wherever it waits."""
        if not self.done:
            self._stopped = True
            self._go.release()
        self._thread.join()
