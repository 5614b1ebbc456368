"""Which emulators a DVC cache or remote holds, read from dvc's run cache.

The run cache keeps an entry for each run of a stage: its command, its parameters, and the hashes of
what it read and wrote. From a `compress` the hashes lead back to its origin: the factors to a
`calibrate`, that one's rows to a `prepare`, which names the source of the data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

POINTER = "artifacts/model.json"
ROWS = "artifacts/data/calibration"
FACTORS = "artifacts/factors"
EMULATORS = "artifacts/emulators/"

# In the order in which they feed one another.
_STAGES = ("pretrain", "prepare", "calibrate", "compress")
_COMMAND = re.compile(rf"python -m tasks\.({'|'.join(_STAGES)})(?: (\S+))?")
_ENTRY = re.compile(r"[0-9a-f]{64}")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Emulator:
    """One emulator.

    Attributes:
        model: name of the original; None if its pointer is gone.
        data: source of the rows that it was calibrated on; None if that run is gone.
        rows: hash of those rows; None as above.
        ratio: as in `ratios` of params.yaml.
        targets: `compress.targets`.
        size: bytes.
        hash: dvc's, of the folder.
        here: whether the cache holds all of it.
        there: whether the remote does; None if none was asked.
        current: whether params.yaml and the code, as they are now, give it.
    """

    model: str | None
    data: str | None
    rows: str | None
    ratio: str
    targets: dict[str, float | str]
    size: int
    hash: str
    here: bool
    there: bool | None
    current: bool


@dataclass(frozen=True)
class Run:
    """A run of a stage, as its entry in the run cache tells it.

    Attributes:
        stage: pretrain, prepare, calibrate or compress.
        ratio: of a compress; otherwise "".
        params: values by the keys that dvc.yaml names.
        deps, outs: hashes by path.
        sizes: bytes of outs by path.
    """

    stage: str
    ratio: str
    params: dict[str, Any]
    deps: dict[str, str]
    outs: dict[str, str]
    sizes: dict[str, int]

    @property
    def emulator(self) -> str:
        """Where a compress wrote its emulator."""
        return EMULATORS + self.ratio


class Place:
    """A DVC cache or remote: entries of runs, and objects by their hashes."""

    def __init__(self, root: Any, objects: Any) -> None:
        """Take dvc's object databases of the root, where `runs` lies, and of the objects."""
        self._fs, self._runs = root.fs, root.fs.join(root.path, "runs")
        self._objects = objects

    def entries(self, known: Iterable[str] = ()) -> dict[str, str]:
        """Name → text of all entries but the known ones; a name is a hash of the text."""
        paths = {self._fs.name(path): path for path in self._fs.find(self._runs)}
        new = {name: path for name, path in paths.items() if _ENTRY.fullmatch(name)}
        for name in known:
            new.pop(name, None)
        read = self._fs.cat(list(new.values())) if new else {}
        return {self._fs.name(path): content.decode() for path, content in read.items()}

    def read(self, hash: str) -> bytes | None:
        """An object's content; None if it is not there."""
        try:
            return self._objects.fs.cat_file(self._objects.oid_to_path(hash))
        except FileNotFoundError:
            return None

    def complete(self, hashes: set[str]) -> set[str]:
        """Those objects that are there; a folder only if all of its files are."""
        found = self._existing(hashes)
        files = {hash: self._files(hash) for hash in found if hash.endswith(".dir")}
        present = self._existing(set().union(*files.values()))
        return {hash for hash in found if files.get(hash, set()) <= present}

    def _files(self, folder: str) -> set[str]:
        return {file["md5"] for file in json.loads(self.read(folder) or b"[]")}

    def _existing(self, hashes: set[str]) -> set[str]:
        ordered = sorted(hashes)
        paths = [self._objects.oid_to_path(hash) for hash in ordered]
        exist = self._objects.fs.exists(paths) if paths else []
        return {hash for hash, is_there in zip(ordered, exist, strict=True) if is_there}


def find_emulators(here: Place, there: Place | None, params: dict[str, Any]) -> list[Emulator]:
    """All emulators that some run wrote, also those whose files are gone.

    Args:
        here: the local cache.
        there: a remote, if one is asked.
        params: the content of params.yaml.

    Returns:
        One for each hash and ratio, ordered by model, data and ratio.
    """
    runs = read_runs(here, there)
    current = current_runs(runs, params)
    cuts = {
        name: run
        for name, run in runs.items()
        if run.stage == "compress" and run.emulator in run.outs
    }
    hashes = {run.outs[run.emulator] for run in cuts.values()}
    held = here.complete(hashes)
    held_there = there.complete(hashes) if there else None
    models = _models({run.deps[POINTER] for run in cuts.values()}, here, there)
    found: dict[tuple[str, str], Emulator] = {}
    for name in sorted(cuts, key=lambda name: (name not in current, name)):
        run = cuts[name]
        hash = run.outs[run.emulator]
        source, rows = _origin(run, runs)
        emulator = Emulator(
            model=models[run.deps[POINTER]],
            data=source,
            rows=rows,
            ratio=run.ratio,
            targets=run.params["compress"]["targets"],
            size=run.sizes[run.emulator],
            hash=hash,
            here=hash in held,
            there=None if held_there is None else hash in held_there,
            current=name in current,
        )
        found.setdefault((hash, run.ratio), emulator)
    return sorted(
        found.values(), key=lambda one: (one.model or "", one.data or "", one.ratio, one.hash)
    )


def read_runs(here: Place, there: Place | None) -> dict[str, Run]:
    """Name of the entry → run, of the stages up to the emulator."""
    texts = here.entries()
    if there is not None:
        texts |= there.entries(known=texts)
    return {name: run for name, text in texts.items() if (run := _parsed(text)) is not None}


def _parsed(text: str) -> Run | None:
    """An entry's run; None for the other stages."""
    if not (match := _COMMAND.search(text.partition("\n")[0])):
        return None
    entry = yaml.load(text, Loader=_LOADER)
    return Run(
        stage=match[1],
        ratio=match[2] or "",
        params=entry.get("params", {}).get("params.yaml", {}),
        deps={dep["path"]: dep["md5"] for dep in entry["deps"]},
        outs={out["path"]: out["md5"] for out in entry["outs"]},
        sizes={out["path"]: out["size"] for out in entry["outs"]},
    )


def current_runs(runs: dict[str, Run], params: dict[str, Any]) -> set[str]:
    """Names of the runs that dvc would take now: same parameters, same code, same inputs."""
    wrote: dict[str, set[str]] = {}
    names = set()
    files: dict[str, str | None] = {}
    for stage in _STAGES:
        for name, run in runs.items():
            if run.stage == stage and _fits(run, params) and _reads(run, wrote, files):
                names.add(name)
                for path, hash in run.outs.items():
                    wrote.setdefault(path, set()).add(hash)
    return names


def _fits(run: Run, params: dict[str, Any]) -> bool:
    """Whether a run had the present parameters."""
    if run.ratio and float(run.ratio) not in params["ratios"]:
        return False
    return all(_value(params, key) == value for key, value in run.params.items())


def _value(params: dict[str, Any], key: str) -> Any:
    """What params.yaml has at a key such as model.source."""
    value: Any = params
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _reads(run: Run, wrote: dict[str, set[str]], files: dict[str, str | None]) -> bool:
    """Whether what a run read is what the stages before it write, and the code of now."""
    for path, hash in run.deps.items():
        if path.startswith("artifacts/"):
            if hash not in wrote.get(path, ()):
                return False
            continue
        if path not in files:
            content = Path(path).read_bytes() if Path(path).is_file() else None
            files[path] = None if content is None else hashlib.md5(content).hexdigest()
        if files[path] != hash:
            return False
    return True


def _models(pointers: set[str], here: Place, there: Place | None) -> dict[str, str | None]:
    """The names of originals by the hashes of their pointers."""
    names: dict[str, str | None] = {}
    for hash in pointers:
        content = here.read(hash) or (there.read(hash) if there else None)
        names[hash] = json.loads(content)["name"] if content else None
    return names


def _origin(cut: Run, runs: dict[str, Run]) -> tuple[str | None, str | None]:
    """Source and hash of the rows that a compress's factors were made from."""
    for calibrate in runs.values():
        if calibrate.outs.get(FACTORS) == cut.deps[FACTORS] and ROWS in calibrate.deps:
            rows = calibrate.deps[ROWS]
            sources = {
                run.params["data"]["source"]
                for run in runs.values()
                if run.outs.get(ROWS) == rows and run.outs.get(POINTER) == cut.deps[POINTER]
            }
            return min(sources, default=None), rows
    return None, None
