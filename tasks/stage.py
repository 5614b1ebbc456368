"""What all stages share: the command line, one-sentence errors, and the measured cost."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from emloc.devices import describe_machine, pick_device
from emloc.files import write_json
from emloc.memory import measure
from tasks.params import Params, load_params


def main(run: Callable[[Params], None]) -> None:
    """Run a stage that no ratio changes: `python -m tasks.NAME`."""
    _parser(run).parse_args()
    with _one_sentence():
        run(load_params())


def main_with_ratio(run: Callable[[Params, float], None]) -> None:
    """Run a stage of one ratio: `python -m tasks.NAME RATIO`."""
    parser = _parser(run)
    parser.add_argument("ratio", type=float, help="one of params.yaml's ratios")
    arguments = parser.parse_args()
    with _one_sentence():
        params = load_params()
        if arguments.ratio not in params.ratios:
            raise ValueError(
                f"{arguments.ratio} is none of the ratios in params.yaml ({params.ratios}): add it "
                "there, or name one of them."
            )
        run(params, arguments.ratio)


def _parser(run: Callable[..., None]) -> argparse.ArgumentParser:
    module = sys.modules[run.__module__]
    name = Path(str(module.__file__)).stem
    return argparse.ArgumentParser(prog=f"python -m tasks.{name}", description=module.__doc__)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Print bad input as one sentence and exit with 1; everything else is a bug and keeps its
    traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


@contextlib.contextmanager
def costing(file: Path, params: Params) -> Iterator[torch.device]:
    """Hand out the device to work on; write seconds, peak memory and the machine to `file`."""
    device = pick_device(params.device)
    with measure(device) as cost:
        yield device
    write_json(file, {**asdict(cost), "machine": describe_machine()})
