"""Run a model over many batches while only one piece of it is in memory.

A *unit* is the piece that is loaded at once: a child of an outermost `nn.ModuleList` (a transformer
block), or any other module with parameters of its own. Each batch runs the model's own forward in
a thread of its own, of which one is awake at a time. Before a unit its thread waits; the scheduler
loads the earliest unit that somebody waits for, lets every batch that waits there through, hands
the unit to the caller while its weights are there, and frees it. So each weight is read once
however many batches there are, and no model needs a forward of ours.

In memory at once: one unit, the next one being read, and what each batch keeps between two units
(its hidden state). A single thread reads ahead, from when the first batch waits for the next unit;
an accelerator holds the one unit only, the next one waits in the CPU's pinned memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from emloc.background import ReadAhead
from emloc.memory import free_math_buffers, give_back_freed_memory
from emloc.passes import Pass
from emloc.weights import OpenedModel

MAX_THREADS = 256  # compute threads in all, over the threads of all batches
# Devices that use the CPU's own memory, so that pinning it would be of no use.
_UNIFIED = ("cpu", "mps")


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


def _refuse_repeats(done: set[str], waiting: Iterable[Pass]) -> None:
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
        self._pins = self.device.type not in _UNIFIED
        self.units = find_units(self.model)
        self._order = {name: place for place, name in enumerate(self.units)}
        self._running: Pass | None = None
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
            self._load(name, self._read(name))

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
    def _loaded(self, unit: str, ahead: ReadAhead[dict[str, Tensor]]) -> Iterator[nn.Module]:
        """Hold one unit's weights on the device for the length of a `with` block."""
        if unit not in self._resident:
            self._load(unit, ahead.take(unit))
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
                Pass(index, partial(self.model, **batch), threads)
                for index, batch in enumerate(batches)
            ]
            for one in passes:
                stack.callback(one.stop)
            ahead = stack.enter_context(ReadAhead(self._read))
            total = len(self.units) - len(self._resident) if until is None else len(until)
            bar = stack.enter_context(tqdm(total=total, desc=progress, disable=progress is None))
            for one in passes:
                self._step(one, on_output)
            while (waiting := [one for one in passes if one.unit]) and remaining != set():
                name = min((one.unit for one in waiting if one.unit), key=self._order.__getitem__)
                with self._loaded(name, ahead) as unit:
                    self._begin_next(ahead, passes, name, remaining)
                    while ready := [one for one in passes if one.unit == name]:
                        for one in ready:
                            self._step(one, on_output)
                            self._begin_next(ahead, passes, name, remaining)
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
        names = list(units)
        with ReadAhead(self._read) as ahead:
            for place, name in enumerate(tqdm(names, desc=progress, disable=progress is None)):
                with self._loaded(name, ahead) as unit:
                    if place + 1 < len(names):
                        ahead.begin(names[place + 1])
                    on_unit(name, unit)

    def _begin_next(
        self,
        ahead: ReadAhead[dict[str, Tensor]],
        passes: Sequence[Pass],
        now: str,
        remaining: set[str] | None,
    ) -> None:
        """Read ahead the earliest unit that a batch waits for and that surely runs after `now`."""
        waited = {one.unit for one in passes if one.unit} - {now}
        if remaining is not None:
            last = max((self._order[name] for name in remaining - {now}), default=-1)
            waited = {name for name in waited if self._order[name] <= last}
        if waited:
            ahead.begin(min(waited, key=self._order.__getitem__))

    def _step(self, one: Pass, on_output: Callable[[int, Any], None] | None) -> None:
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

    def _read(self, unit: str) -> dict[str, Tensor]:
        """A unit's parameters by name, in the CPU's memory; the disk's part of the work is done."""
        places = list(self._parameters(unit))
        tensors = self.store.read(name for name, _, _ in places)
        for name, owner, key in places:
            if self._pins:
                tensors[name] = tensors[name].pin_memory()
            else:
                dtype = owner._parameters[key].dtype  # type: ignore[union-attr]
                tensors[name] = _in_memory(tensors[name], dtype)
        return tensors

    def _load(self, unit: str, tensors: dict[str, Tensor]) -> None:
        for name, owner, key in self._parameters(unit):
            dtype = owner._parameters[key].dtype  # type: ignore[union-attr]
            value = tensors.pop(name).to(self.device, non_blocking=self._pins).to(dtype)
            owner._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _free(self, unit: str) -> None:
        for _, owner, key in self._parameters(unit):
            empty = torch.empty_like(owner._parameters[key], device="meta")  # type: ignore[arg-type]
            owner._parameters[key] = nn.Parameter(empty, requires_grad=False)


def _in_memory(mapped: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a file that is mapped into memory, really read and in a given dtype.

    A page is read from the disk when it is first looked at; numpy lets other threads run meanwhile.
    """
    if mapped.dtype == dtype:
        mapped.reshape(-1).view(torch.uint8).numpy()[:: mmap.PAGESIZE].sum()
    return mapped.to(dtype)
