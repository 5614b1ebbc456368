"""Silence the libraries for work that is not the user's.

- `quiet_libraries`: transformers and accelerate
- `quiet_diffusers`
- on import: bitsandbytes, which tells when it is imported, as diffusers does, of a kernel it lacks
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers' and accelerate's warnings and bars for work that is not the user's."""
    offloading = logging.getLogger("accelerate.big_modeling")
    offloading_level, level = offloading.level, transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    offloading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        offloading.setLevel(offloading_level)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence diffusers' warnings and bars for work that is not the user's."""
    level, bars = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
        if bars:
            diffusers_logging.enable_progress_bar()
