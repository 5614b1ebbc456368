"""What the stages wrote, read from dvc.lock and from the files that it names.

- `read_branch`: one ratio, from the data to the scores
- `read_shared`: what the ratios are compared with, and the report
- `read_samples`: a few test rows with what each way of answering them said

Only current results are read: those that `dvc status` would not call changed.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.stages import Stage, StageError, ancestors, one_line, read_graph, read_lock

Entry = Mapping[str, Any]
"""A stage in dvc.lock: cmd, deps, params, outs."""

GIB = 2**30
_COST = ".cost.json"
_OTHER = " | "  # between the machines of one run
_PLAIN_KEY = re.compile(r"[\w-]+")

# What each stage's own folder is.
_FOLDERS = {
    "pretrain": "pretrained",
    "calibrate": "factors",
    "compress": "emulator",
    "teach": "taught",
    "heal": "emulator.healed",
    "train": "adapter.raw",
    "correct": "adapter.corrected",
    "evaluate": "predictions",
    "direct": "adapter.direct",
    "baseline": "predictions",
    "report": "report",
}


class ResultError(Exception):
    """There is no current result; the message says in a sentence what is missing or changed."""


@dataclass(frozen=True)
class Results:
    """What some stages wrote.

    Attributes:
        ratio: as in the names of the stages; None where no ratio applies.
        key: hash of the stages' entries in dvc.lock: what they read, ran and wrote.
        group: the same without ratio and outs: equal for all ratios of the same data, model, code
            and params, also for a ratio that is added later.
        model: name of the original.
        params: dotted key → value as text, of the params that these stages depend on.
        metrics: stage/metric → value, system/STAGE_seconds and system/STAGE_peak_gib.
        curves: stage/curve/column → (step, value) pairs.
        machine: what the stages ran on.
        hashes: DVC's hash of the emulator, adapter.raw, data.train ...
        folders: the same names → folder, for those that are folders.
    """

    ratio: str | None
    key: str
    group: str
    model: str
    params: dict[str, str]
    metrics: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]
    machine: dict[str, str]
    hashes: dict[str, str]
    folders: dict[str, Path]


def read_branch(ratio: str) -> Results:
    """The results of one ratio: of `evaluate` and of all stages that it needs.

    Raises:
        ResultError: they are not in dvc.lock or not in the workspace, or something that they
            depend on has changed since.
        StageError: there is no DVC project here, or its files cannot be read.
    """
    with _open_project() as project:
        name = f"evaluate@{ratio}"
        if name not in project.graph:
            known = ", ".join(s.ratio or "" for s in project.graph.values() if s.kind == "evaluate")
            raise ResultError(
                f"ratio is {ratio}, but the ratios of params.yaml are {known}: name one of them, "
                "or add it there."
            )
        names = ancestors(project.graph, [name])
        project.check(names, f"ratio {ratio}")
        return project.read(names, ratio, group_of(project.entries(names)))


def read_shared() -> Results:
    """The report, and what no ratio changes; its params are those that all ratios share.

    Raises:
        ResultError, StageError: see `read_branch`.
    """
    with _open_project() as project:
        names = ancestors(project.graph, ["report"])
        project.check(names, "the report")
        scored = next(name for name in names if project.graph[name].kind == "evaluate")
        branch = project.entries(ancestors(project.graph, [scored]))
        plain = {name for name in names if project.graph[name].ratio is None}
        results = project.read(plain, None, group_of(branch))
        return replace(results, params=_params_of(branch))


def read_samples(folder: Path, count: int = 20) -> dict[str, list[str]]:
    """The first rows of a predictions folder as columns: prompt, answer, and each way's answer."""
    columns: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        with open(file, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in itertools.islice(lines, count)]
        columns["prompt"] = [_turns(row)[0] for row in rows]
        columns["answer"] = [_turns(row)[1] for row in rows]
        columns[file.stem] = [row["prediction"] for row in rows]
    return columns


def key_of(entries: Mapping[str, Entry]) -> str:
    """A hash of entries of dvc.lock."""
    content = json.dumps(entries, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def group_of(entries: Mapping[str, Entry]) -> str:
    """A hash of a branch's entries that is the same for every ratio."""
    branch = [(Stage(name, frozenset()), entry) for name, entry in entries.items()]
    varying = {out["path"] for stage, entry in branch if stage.ratio for out in entry["outs"]}
    shared = {
        stage.kind: {
            "cmd": [word for word in entry["cmd"].split() if word != stage.ratio],
            "deps": [dep for dep in entry.get("deps", []) if dep["path"] not in varying],
            "params": entry.get("params", {}),
        }
        for stage, entry in branch
    }
    return key_of(shared)


@dataclass(frozen=True)
class _Project:
    """The stages as dvc.yaml has them, as a graph, and as dvc.lock has them."""

    stages: dict[str, Any]
    graph: dict[str, Stage]
    lock: dict[str, dict[str, Any]]

    def entries(self, names: Collection[str]) -> dict[str, Entry]:
        return {name: self.lock[name] for name in names}

    def check(self, names: Collection[str], what: str) -> None:
        """Refuse results of these stages that `dvc status` would call changed."""
        ordered = [name for name in self.graph if name in names]
        if missing := [name for name in ordered if name not in self.lock]:
            raise ResultError(
                f"There is no result of {what} yet ({missing[0]} did not run): run dvc repro."
            )
        changes: dict[str, str] = {}
        for name in ordered:
            stage = self.stages[name]
            if stage.cmd_changed:
                changes[f"the command of {name}"] = "modified"
            for item in [*stage.deps, *stage.outs]:
                changes |= _flat_status(item.workspace_status())
        if changes:
            listed = ", ".join(f"{path} is {state}" for path, state in changes.items())
            raise ResultError(
                f"The result of {what} is not that of the files here ({listed}): run dvc repro."
            )

    def read(self, names: Collection[str], ratio: str | None, group: str) -> Results:
        entries = self.entries(names)
        results = Results(
            ratio=ratio,
            key=key_of(entries),
            group=group,
            model=_model_name(self.lock),
            params=_params_of(entries),
            metrics={},
            curves={},
            machine={},
            hashes={},
            folders={},
        )
        for name in self.graph:
            if name in names:
                for out in self.stages[name].outs:
                    _collect(out, self.graph[name].kind, results)
        return results


@contextlib.contextmanager
def _open_project() -> Iterator[_Project]:
    """The project at one moment: no dvc command writes to it meanwhile."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    try:
        with Repo(_wait_for_lock=True) as repo, lock_repo(repo):
            stages = {stage.addressing: stage for stage in repo.index.stages}
            yield _Project(stages, read_graph(), read_lock())
    except DvcException as error:
        raise StageError(one_line(error)) from error


def _flat_status(status: Mapping[str, Any]) -> dict[str, str]:
    """dvc's status of a file, or of the params within a file, by name."""
    flat: dict[str, str] = {}
    for path, state in status.items():
        named = isinstance(state, dict)
        flat |= {f"{key} in {path}": of for key, of in state.items()} if named else {path: state}
    return flat


def _collect(out: Any, kind: str, results: Results) -> None:
    """Read one out of a stage into the results, by what dvc.yaml says that it is."""
    path, value = Path(str(out)), out.hash_info.value
    if path.name.endswith(_COST):
        _add_cost(path, kind, results)
    elif out.metric:
        for key, figure in flatten(_read_json(path), separator="/").items():
            if isinstance(figure, int | float):
                results.metrics[f"{kind}/{key}"] = figure
    elif out.plot:
        for column, points in read_curve(path).items():
            results.curves[f"{kind}/curve/{column}"] = points
    elif value.endswith(".dir"):
        name = f"data.{path.name}" if kind == "prepare" else _FOLDERS[kind]
        results.hashes[name] = value
        results.folders[name] = path
    else:
        results.hashes[path.stem] = value


def _add_cost(path: Path, kind: str, results: Results) -> None:
    cost = _read_json(path)
    results.metrics[f"system/{kind}_seconds"] = cost["seconds"]
    results.metrics[f"system/{kind}_peak_gib"] = cost["peak_bytes"] / GIB
    if cost.get("planned_bytes"):
        results.metrics[f"system/{kind}_planned_gib"] = cost["planned_bytes"] / GIB
    for name, value in {"device": cost["device"], **cost.get("machine", {})}.items():
        seen = results.machine.get(name, "").split(_OTHER)
        if value is not None and str(value) not in seen:
            results.machine[name] = _OTHER.join(filter(None, [*seen, str(value)]))


def read_curve(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The columns of a CSV file over its column `step`, without its empty cells; nothing if it
    has no such column."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with open(path, newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if (step := row.pop("step", None)) is None:
                break
            for column, cell in row.items():
                if cell:
                    curves.setdefault(column, []).append((int(step), float(cell)))
    return curves


def flatten(tree: Mapping[str, Any], *, separator: str, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one; a mapping with a key that is no plain name stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value and all(map(_PLAIN_KEY.fullmatch, value))
        if nested:
            flat |= flatten(value, separator=separator, prefix=f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _params_of(entries: Mapping[str, Entry]) -> dict[str, str]:
    flat: dict[str, Any] = {}
    for entry in entries.values():
        for params in entry.get("params", {}).values():
            flat |= flatten(params, separator=".")
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in sorted(flat.items())
    }


def _model_name(lock: Mapping[str, Entry]) -> str:
    paths = [Path(out["path"]) for out in lock["prepare"]["outs"]]
    return _read_json(next(path for path in paths if path.stem == "model"))["name"]


def _turns(row: Mapping[str, Any]) -> tuple[str, str]:
    """A data row's prompt and answer; of a chat, all turns but the last one and the last one."""
    if "messages" not in row:
        return row["prompt"], row["answer"]
    *asked, last = row["messages"]
    turns = [f"{turn['role']}: {_said(turn['content'])}" for turn in asked]
    return "\n".join(turns), _said(last["content"])


def _said(content: str | list[Mapping[str, str]]) -> str:
    """The text of a message, with the names of its pictures where they stand."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text") or f"[{Path(part['image']).name}]" for part in content)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
