"""One training by several processes, each with a device of its own: accelerate or torchrun starts
them.

- `share`: a step's rows are divided, so that the batch does not depend on the number of processes
- `StepShares`: which rows of each step are this process's
- `SharedTrainer`: transformers' Trainer with gradients that are summed once a step
- `shard_frozen`: the frozen weights in pieces, one on each process (PyTorch's FSDP)

Only LoRA weights have gradients, so one sum of them a step is all that replicas have to exchange;
they need no DistributedDataParallel around the model.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, set_seed

from emloc.devices import pick_device

FILLER = -1  # index of a batch that counts for nothing, for a process without rows in a round
T = TypeVar("T")


def count() -> int:
    """How many processes train together; 1 if no process group was started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files and shows the progress."""
    return number() == 0


def agree(value: T) -> T:
    """The first process's value, in all of them."""
    return cast(T, broadcast_object_list([value])[0]) if count() > 1 else value


def local_device(name: str) -> torch.device:
    """This process's device among those of this machine; `name` as in `pick_device`.

    Raises:
        ValueError: there are more processes on this machine than devices.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or name == "cpu" or "LOCAL_RANK" not in os.environ:
        return pick_device(name)
    place, devices = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
    if place >= devices:
        raise ValueError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes were started on this machine, but it has "
            f"{devices} device(s) of type {accelerator.type}: start no more processes than devices."
        )
    torch.accelerator.set_device_index(place)
    return torch.device(pick_device(name).type, place)


def share(batch_size: int, accumulation: int, processes: int) -> tuple[int, int]:
    """Rows in a forward pass and passes a step of each process, for the same rows a step in all.

    Raises:
        ValueError: the rows of a step cannot be divided.
    """
    rows, rest = divmod(batch_size * accumulation, processes)
    if rest:
        raise ValueError(
            f"batch_size · accumulation is {batch_size} · {accumulation}, which cannot be divided "
            f"among {processes} processes: make it a multiple of {processes}."
        )
    size = max(size for size in range(1, batch_size + 1) if rows % size == 0)
    return size, rows // size


class StepShares(Sampler[list[int]]):
    """One process's batches of one epoch.

    The rows of a step are those that a single process would take, cut into batches that are dealt
    to the processes in turn. All processes get as many; where rows run out, a batch is `[FILLER]`.

    Args:
        sampler: row order of an epoch.
        batch_size: rows in a batch.
        batches: of each process in a full step.
        processes: how many there are.
        number: which of them this is.
    """

    def __init__(
        self, sampler: Sampler[int], batch_size: int, batches: int, processes: int, number: int
    ) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self.processes, self.number = processes, number
        self.step_rows = batch_size * batches * processes
        self.drop_last = False

    def __len__(self) -> int:
        steps, rest = divmod(len(cast(Sized, self.sampler)), self.step_rows)
        round_rows = self.batch_size * self.processes
        return steps * (self.step_rows // round_rows) + math.ceil(rest / round_rows)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start in range(0, len(order), self.step_rows):
            rows = order[start : start + self.step_rows]
            batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            for first in range(0, len(batches), self.processes):
                place = first + self.number
                yield batches[place] if place < len(batches) else [FILLER]


class Filled(Sequence[Any]):
    """Training rows, and at `FILLER` the shortest one without its labels."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows
        shortest = min(rows, key=lambda row: len(row["input_ids"]))
        self.filler = {**shortest, "labels": [-100] * len(shortest["labels"])}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.filler if index == FILLER else self.rows[index]


class SharedTrainer(Trainer):
    """transformers' Trainer, whose steps are shared by all processes; with one it is the same."""

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        if count() > 1:  # the Trainer then leaves placing, wrapping and gradients to us
            model.is_distributed_loading_by_transformers = cast(Any, True)
        super().__init__(model, *args, **options)
        if not is_first():
            set_seed((self.args.seed + number()) % 2**32)  # no two drop out the same

    def get_train_dataloader(self) -> Any:
        """Batches of this process's rows alone."""
        if count() == 1:
            return super().get_train_dataloader()
        sampler = cast(Any, self._get_train_sampler())
        size, batches = self.args.train_batch_size, self.args.gradient_accumulation_steps
        loader: DataLoader[Any] = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=StepShares(sampler, size, batches, count(), number()),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """A forward and a backward pass; the last ones of a step give all the same gradients."""
        loss = super().training_step(*args, **options)
        if count() > 1 and self.accelerator.sync_gradients:
            _average_gradients(p for p in cast(nn.Module, self.model).parameters())
        return loss

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Start from the same weights everywhere: those of the first process."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Sharded weights are frozen, so there is nothing to defer."""
        yield


def _average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give all processes the mean gradient; a parameter that none used keeps none."""
    trained = [p for p in parameters if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.float32)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([*(g.float().flatten() for g in gradients), used.to(trained[0].device)])
    dist.all_reduce(flat)
    *means, users = (flat / count()).split([*(p.numel() for p in trained), len(trained)])
    for parameter, mean, user in zip(trained, means, users.tolist(), strict=True):
        if user:
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)


def shard_frozen(model: nn.Module, device: torch.device) -> None:
    """Leave each process a piece of every frozen weight; a block is whole only while it computes.

    Args:
        model: a model with a LoRA, on the CPU; changed in place. Of a vision-language model the
            language model's blocks are loaded one by one; what lies outside of them is whole on
            each process for the length of a step, as the LoRA always is.
        device: of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count(),))
    trained = {p for p in model.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    decoder = getattr(model, "get_decoder", lambda: model)()
    for block in _blocks(decoder):
        fully_shard(block, mesh=mesh, ignored_params=trained)
    # Not left whole after a forward pass, as the outermost part is by default: saving on the first
    # process would cut it there, and then only that one would gather it again.
    fully_shard(model, mesh=mesh, ignored_params=trained, reshard_after_forward=True)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Children of the outermost `nn.ModuleList`s."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
