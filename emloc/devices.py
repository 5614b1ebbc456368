"""Devices and dtypes by the names that users write, and the machine in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device is {name!r}, which cannot be used here ({reason}): write auto or cpu."
        ) from error


def pick_dtype(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        ValueError: none of `DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}, but must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def free_bytes(device: torch.device) -> int:
    """Memory of a device that new tensors can take; where it uses the CPU's, that of the system."""
    tell = getattr(torch.get_device_module(device), "mem_get_info", None)
    if device.type == "cpu" or tell is None:
        return int(psutil.virtual_memory().available)
    kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(tell(device)[0]) + kept  # torch keeps freed memory for new tensors


def describe_machine() -> dict[str, Any]:
    """Processor, accelerator, memory and versions: what a reader needs to judge a measured figure,
    and nothing private."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": None if accelerator is None else _accelerator_name(accelerator),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def _accelerator_name(accelerator: torch.device) -> str:
    module = torch.get_device_module(accelerator)
    return module.get_device_name() if hasattr(module, "get_device_name") else accelerator.type


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
