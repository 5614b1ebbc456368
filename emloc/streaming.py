"""Run a model over many batches while only one piece of it is in memory.

A *unit* is the piece that is loaded at once: a child of an outermost `nn.ModuleList` (a transformer
block), or any other module with parameters of its own. Each batch runs the model's own forward in
a thread of its own, of which one is awake at a time. Before a unit its thread waits; the scheduler
loads the earliest unit that somebody waits for, lets every batch that waits there through, hands
the unit to the caller while its weights are there, and frees it. So each weight is read once
however many batches there are, and no model needs a forward of ours.

In memory at once: one unit, and what each batch keeps between two units (its hidden state).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from emloc.memory import free_math_buffers, give_back_freed_memory
from emloc.weights import OpenedModel

MAX_THREADS = 256  # compute threads in all, over the threads of all batches


class _Stop(BaseException):
    """Ends a waiting thread; a BaseException, so that no model code catches it."""


class _Pass:
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


def find_units(model: nn.Module) -> dict[str, nn.Module]:
    """Units of a model by name, in registration order (see the module's docstring)."""
    units: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str, in_list: bool) -> None:
        containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
        holds_any = next(module.parameters(), None) is not None
        if in_list and holds_any and not isinstance(module, containers):
            units[name] = module
            return
        if any(parameter is not None for parameter in module._parameters.values()):
            units[name] = module
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            visit(child, path, isinstance(module, (nn.ModuleList, nn.ModuleDict)))

    visit(model, "", False)
    return units


def _refuse_repeats(done: set[str], waiting: Iterable[_Pass]) -> None:
    for one in waiting:
        if one.unit in done:
            raise ValueError(
                f"{one.unit} runs more than once in one forward pass, with other layers in "
                "between, which streaming cannot stop in: leave it out of the targets."
            )


class Stream:
    """A model on the meta device that runs unit by unit.

    Args:
        opened: the model and where its weights are.
        device: where units are computed.

    Attributes:
        current: index of the batch that is running, for hooks of the caller.
        units: name → module, in registration order.
    """

    def __init__(self, opened: OpenedModel, device: torch.device | str) -> None:
        self.model, self.store, self.device = opened.model, opened.store, torch.device(device)
        self.units = find_units(self.model)
        self._order = {name: place for place, name in enumerate(self.units)}
        self._running: _Pass | None = None
        # A module with units below it (one that owns a class token, say) keeps its own parameters.
        self._resident = {
            name
            for name in self.units
            if any(o != name and o.startswith(f"{name}." if name else "") for o in self.units)
        }
        for buffers in (module._buffers for module in self.model.modules()):
            for key, buffer in buffers.items():
                buffers[key] = None if buffer is None else buffer.to(self.device)
        for name in self._resident:
            self._load(name)

    @property
    def current(self) -> int:
        """Index of the batch whose forward is running."""
        if self._running is None:
            raise RuntimeError("no batch is running")
        return self._running.index

    def unit_of(self, module_name: str) -> str:
        """Name of the unit that holds a module.

        Raises:
            KeyError: no unit holds it.
        """
        parts = module_name.split(".")
        for end in range(len(parts), -1, -1):
            if (name := ".".join(parts[:end])) in self.units:
                return name
        raise KeyError(module_name)

    @contextmanager
    def loaded(self, unit: str) -> Iterator[nn.Module]:
        """Hold one unit's weights on the device for the length of a `with` block."""
        if unit not in self._resident:
            self._load(unit)
        try:
            yield self.units[unit]
        finally:
            if unit not in self._resident:
                self._free(unit)

    def run(
        self,
        batches: Sequence[Mapping[str, Any]],
        *,
        on_unit: Callable[[str, nn.Module], None] | None = None,
        on_output: Callable[[int, Any], None] | None = None,
        until: set[str] | None = None,
        progress: str | None = None,
    ) -> None:
        """Run the model's forward over all batches together, every unit loaded once.

        Args:
            batches: keyword arguments of the forward, one mapping a batch, on `device`.
            on_unit: called with a unit's name and module after all batches that waited for it went
                through, while its weights are loaded.
            on_output: called with a batch's index and what the forward returned.
            until: stop after these units; the rest of the model is neither read nor run.
            progress: label of a progress bar over the units.

        Raises:
            ValueError: after the last unit of `until` the forward comes back to one of them, so
                that what was handed over is not all of it.
            Whatever the model's forward or a hook raises.
        """
        give_back_freed_memory()
        remaining = None if until is None else set(until)
        threads = max(1, min(torch.get_num_threads(), MAX_THREADS // max(1, len(batches))))
        with ExitStack() as stack:
            for name, unit in self.units.items():
                if name not in self._resident:
                    hook = self._pause_before(name)
                    handle = unit.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                    stack.callback(handle.remove)
            passes = [
                _Pass(index, partial(self.model, **batch), threads)
                for index, batch in enumerate(batches)
            ]
            for one in passes:
                stack.callback(one.stop)
            total = len(self.units) - len(self._resident) if until is None else len(until)
            bar = stack.enter_context(tqdm(total=total, desc=progress, disable=progress is None))
            for one in passes:
                self._step(one, on_output)
            while (waiting := [one for one in passes if one.unit]) and remaining != set():
                name = min((one.unit for one in waiting if one.unit), key=self._order.__getitem__)
                with self.loaded(name) as unit:
                    while ready := [one for one in passes if one.unit == name]:
                        for one in ready:
                            self._step(one, on_output)
                    if on_unit is not None:
                        on_unit(name, unit)
                if remaining is None or name in remaining:
                    bar.update()
                if remaining is not None:
                    remaining.discard(name)
            if until is not None:
                _refuse_repeats(until, waiting)

    def visit(
        self,
        units: Iterable[str],
        on_unit: Callable[[str, nn.Module], None],
        *,
        progress: str | None = None,
    ) -> None:
        """Load some units one after the other without running anything."""
        for name in tqdm(list(units), desc=progress, disable=progress is None):
            with self.loaded(name) as unit:
                on_unit(name, unit)

    def _step(self, one: _Pass, on_output: Callable[[int, Any], None] | None) -> None:
        self._running = one
        try:
            one.resume()
        finally:
            self._running = None
            free_math_buffers()
        if one.done:
            if on_output is not None:
                on_output(one.index, one.result)
            one.result = None

    def _pause_before(self, unit: str) -> Callable[..., None]:
        def pause(*_: Any) -> None:
            if self._running is None:
                raise RuntimeError("a streamed model runs through Stream.run only")
            self._running.wait(unit)

        return pause

    def _parameters(self, unit: str) -> Iterator[tuple[str, nn.Module, str]]:
        """Full name, owner and own name of each parameter that a unit loads."""
        for path, owner in self.units[unit].named_modules(prefix=unit):
            if unit in self._resident and owner is not self.units[unit]:
                continue
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    yield f"{path}.{key}" if path else key, owner, key

    def _load(self, unit: str) -> None:
        places = list(self._parameters(unit))
        tensors = self.store.read((name for name, _, _ in places), self.device)
        for name, owner, key in places:
            dtype = owner._parameters[key].dtype  # type: ignore[union-attr]
            value = tensors.pop(name).to(dtype)
            owner._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _free(self, unit: str) -> None:
        for _, owner, key in self._parameters(unit):
            empty = torch.empty_like(owner._parameters[key], device="meta")  # type: ignore[arg-type]
            owner._parameters[key] = nn.Parameter(empty, requires_grad=False)
