"""Devices and dtypes by the names that users write."""

from __future__ import annotations

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
