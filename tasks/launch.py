"""Work of a stage in several processes: `accelerate launch` starts them, and ends with them.

- `Crew`: how many processes there are, from `launch` in params.yaml
- `run_in_processes`: start them, wait, and return what the first one made
- `serve`: what such a process does

Another machine takes part by running the same stage's command with its own `machine_rank` in
accelerate's file; it writes nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import patch_environment

from emloc.files import read_json, write_json
from tasks.sections import Launch

TASK, RESULT, CONFIG = "task.json", "result.json", "accelerate.yaml"
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
_ORPHAN_SECONDS = 1.0  # after which a process notices that its stage is gone
_SEEN = ("ValueError", "FileNotFoundError")  # as in `tasks.stage`: bad input, told in a sentence


@dataclass(frozen=True)
class Crew:
    """The processes that share a piece of work.

    Attributes:
        content: accelerate's own config.
        shard: whether each holds but a piece of the frozen weights.
    """

    content: dict[str, Any]
    shard: bool

    @property
    def processes(self) -> int:
        """How many there are on all machines."""
        return int(self.content["num_processes"])

    @property
    def is_first_machine(self) -> bool:
        """Whether the process that writes is on this machine."""
        return not self.content.get("machine_rank")

    @classmethod
    def of(cls, launch: Launch) -> Crew:
        """The processes that params.yaml asks for.

        Raises:
            ValueError: accelerate's config cannot be read, or asks for what is not handled.
        """
        if launch.config is None:
            content = {"distributed_type": "MULTI_GPU", "num_processes": launch.processes}
            return cls({"compute_environment": "LOCAL_MACHINE", **content}, launch.shard)
        content = _read_config(launch.config)
        kind, options = content["distributed_type"], content.get("fsdp_config", {})
        if not (kind.startswith("MULTI_") or kind == "FSDP"):
            allowed = "MULTI_GPU or another MULTI_ kind, or FSDP"
            raise _refused(launch.config, f"distributed_type {kind!r}", allowed)
        if content["num_processes"] < 2:
            found = f"num_processes {content['num_processes']}"
            raise _refused(launch.config, found, "at least 2 (or set launch to null)")
        if content["num_processes"] % content.get("num_machines", 1):
            found = f"num_processes {content['num_processes']} and num_machines "
            found += str(content["num_machines"])
            raise _refused(launch.config, found, "as many processes on each machine")
        if options.get("fsdp_offload_params") or content.get("parallelism_config"):
            found = "fsdp_offload_params or a parallelism_config"
            raise _refused(launch.config, found, "neither: only the frozen weights are sharded")
        return cls(content, launch.shard or kind == "FSDP")


def _read_config(file: str) -> dict[str, Any]:
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        content: dict[str, Any] = load_config_from_file(file).to_dict()
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(
            f"launch.config is {file!r}, which is no config of accelerate's "
            f"({' '.join(str(error).split())}): write it with `accelerate config --config_file "
            f"{file}`."
        ) from error
    return content


def _refused(file: str, found: str, allowed: str) -> ValueError:
    return ValueError(f"launch.config: {file} has {found}, but must have {allowed}.")


def run_in_processes(module: str, task: dict[str, Any], crew: Crew, *, precision: str) -> Any:
    """Run `python -m MODULE FOLDER` in each process of a crew, where `serve` takes it up.

    The processes die with this one, and a signal that ends it ends them.

    Args:
        module: has `serve` at its end.
        task: for all of them; JSON.
        crew: the processes.
        precision: of `TrainSettings`; it takes the place of what accelerate's config says.

    Returns:
        What the first process returned; None on a machine that does not have it.

    Raises:
        ValueError: what stopped the process that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="emloc-launch-") as scratch:
        folder = Path(scratch)
        write_json(folder / TASK, {"task": task, "stage": os.getpid()})
        (folder / CONFIG).write_text(yaml.safe_dump(crew.content), encoding="utf-8")
        options = ["--multi_gpu", "--config_file", str(folder / CONFIG), "--log_dir", scratch]
        options += ["--mixed_precision", "bf16" if precision == "bfloat16" else "no"]
        if crew.content.get("num_machines", 1) == 1:
            options += ["--main_process_port", "0"]  # any that is free
        stopped = _start([*options, "-m", module, scratch], folder)
        result = read_json(folder / RESULT) if (folder / RESULT).exists() else None
    if stopped is not None:
        signal.raise_signal(stopped)
        sys.exit(128 + stopped)
    return result


def _start(arguments: list[str], folder: Path) -> signal.Signals | None:
    """`accelerate launch` in this process; returns the signal that ended it, if one did."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        with _torch_kept_in_bounds():
            launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        raise _cause(folder, number, failure.exitcode) from None
    except ConnectionError as error:  # the port of several machines is taken
        raise ValueError(f"the processes could not be started: {error}") from error
    except SignalException as error:
        return error.sigval
    return None


@contextmanager
def _torch_kept_in_bounds() -> Iterator[None]:
    """Bound what torch's launcher does to this process.

    It replaces the handlers of signals, also of those that are ignored (under nohup, say), and it
    logs pages about a failed process, whose cause `_cause` tells in a sentence.
    """
    before = {name: signal.getsignal(getattr(signal, name)) for name in _SIGNALS}
    heeded = [name for name, handler in before.items() if handler != signal.SIG_IGN]
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with patch_environment(torchelastic_signals_to_handle=",".join(heeded)):
            yield
    finally:
        logging.disable(disabled)
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def _cause(folder: Path, number: int, exit_code: int) -> ValueError:
    """The first process's sentence on bad input; for a bug its traceback goes to stderr."""
    reports = [read_json(file) for file in sorted(folder.glob("failed-*.json"))]
    for report in reports:
        if report["kind"] in _SEEN:
            return ValueError(report["message"])
    if reports:
        first = min(reports, key=lambda report: report["time"])
        sys.stderr.write(first["traceback"])
        text = f"{first['kind']}: {' '.join(first['message'].split())}"
        return ValueError(f"process {first['number']} of the training failed ({text}).")
    how = f"by signal {-exit_code}" if exit_code < 0 else f"with exit code {exit_code}"
    return ValueError(
        f"process {number} of the training ended {how}: see the lines above; if there are none, "
        "memory may have run out."
    )


def serve(work: Callable[[dict[str, Any]], Any]) -> None:
    """Do a task in a process that `run_in_processes` started; the first one's result is kept."""
    folder = Path(sys.argv[1])
    content = read_json(folder / TASK)
    number = int(os.environ["RANK"])
    threading.Thread(target=_end_with, args=(content["stage"],), daemon=True).start()
    try:
        result = work(content["task"])
        if number == 0:
            write_json(folder / RESULT, result)
        PartialState().destroy_process_group()
    except KeyboardInterrupt:  # the stage says so
        os._exit(130)
    except Exception as error:
        report = {"number": number, "time": time.time(), "kind": type(error).__name__}
        report |= {"message": str(error), "traceback": traceback.format_exc()}
        write_json(folder / f"failed-{number:04d}.json", report)
        os._exit(1)  # at once: others may wait for this process


def _end_with(stage: int) -> None:
    """End this process when its stage is gone, however it ended."""
    while os.getppid() == stage:
        time.sleep(_ORPHAN_SECONDS)
    os._exit(1)
