"""Stages that train in several processes: same results, plain words, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from emloc.files import read_json, read_jsonl, write_jsonl
from tasks.launch import Crew
from tasks.params import Params, load_params
from tasks.sections import Launch
from tests.project import (
    ROOT,
    make_diffusion_project,
    make_project,
    make_vision_project,
    run_stage,
    write_params,
)
from tests.together import free_port

ONE = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2}


def written(folder: Path, **changes: Any) -> str:
    """A config of accelerate's in a file."""
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump({**ONE, **changes}))
    return str(file)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({}, "processes is None and config is None, but exactly one"),
        ({"processes": 2, "config": "a.yaml"}, "processes is 2 and config is a.yaml"),
        ({"processes": 1}, "launch.processes is 1, but it should be greater than or equal to 2"),
        ({"process": 2}, "launch.process is no known key; did you mean processes?"),
    ],
)
def test_bad_launch_sections_are_refused(
    tmp_path: Path, launch: dict[str, Any], message: str
) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    write_params(tmp_path, {**params, "launch": launch})
    with pytest.raises(ValueError) as raised:
        load_params(tmp_path / "params.yaml")
    assert message in str(raised.value)


def test_a_device_of_its_own_for_each_process_needs_no_number(tmp_path: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    write_params(tmp_path, {**params, "device": "cuda:1", "launch": {"processes": 2}})
    with pytest.raises(ValueError, match="device is 'cuda:1'.*: write cuda or auto"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"distributed_type": "DEEPSPEED"},
            "has distributed_type 'DEEPSPEED', but must have MULTI",
        ),
        ({"num_processes": 1}, "has num_processes 1, but must have at least 2"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": True}},
            "has fsdp_offload_params or a parallelism_config, but must have neither",
        ),
        (
            {"num_processes": 3, "num_machines": 2},
            "has num_processes 3 and num_machines 2, but must have as many processes on each",
        ),
        ({"processes": 2}, "no config of accelerate's .*unknown keys"),
    ],
)
def test_configs_that_are_not_handled_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Crew.of(Launch(config=written(tmp_path, **changes)))


def test_a_config_that_is_not_there_is_refused_with_the_command_that_writes_it() -> None:
    with pytest.raises(ValueError, match="accelerate config --config_file nowhere.yaml"):
        Crew.of(Launch(config="nowhere.yaml"))


def test_a_config_says_how_many_processes_and_whether_weights_are_sharded(tmp_path: Path) -> None:
    machine = dict(num_processes=8, num_machines=2, machine_rank=1, distributed_type="FSDP")
    crew = Crew.of(Launch(config=written(tmp_path, fsdp_config={"fsdp_version": 2}, **machine)))
    assert (crew.processes, crew.shard, crew.is_first_machine) == (8, True, False)
    here = Crew.of(Launch(processes=4))
    assert (here.processes, here.shard, here.is_first_machine) == (4, False, True)


def test_no_stage_depends_on_how_it_is_started() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert "train" in stages["train"]["params"]
    assert not [s for s in stages.values() if {"launch", "device"} & set(s["params"])]


@pytest.mark.parametrize("file", [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))])
def test_params_reach_the_processes_as_they_are(file: Path) -> None:
    params = load_params(file)
    assert Params.model_validate(params.model_dump(mode="json")) == params


def make_mixed_project(folder: Path) -> dict[str, Any]:
    """A vision-language project in which every other row has no picture."""
    params = make_vision_project(folder)
    rows = folder.parent / f"{folder.name}-inputs" / "rows.jsonl"
    lines = read_jsonl(rows)
    for line in lines[::2]:
        del line["image"]
        question = line["conversations"][0]
        question["value"] = question["value"].removeprefix("<image>\n")
    write_jsonl(rows, lines)
    params["train"] |= {"batch_size": 1, "accumulation": 4}  # a step mixes them, a pass does not
    write_params(folder, params)
    return params


MAKERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "language": make_project,
    "mixed": make_mixed_project,
    "diffusion": make_diffusion_project,
}
SHARED = [("language", False), ("mixed", False), ("mixed", True), ("diffusion", False)]


def prepared(folder: Path, maker: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """A project that is ready to train at ratio 0.5, in the current directory; its params."""
    params = maker(folder)
    os.chdir(folder)
    for name in ("prepare", "calibrate"):
        run_stage(name)
    run_stage("compress", 0.5)
    run_stage("heal", 0.5)
    return params


@pytest.fixture
def project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """`prepared`, with the folder's model of the kind in the test's parameters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return prepared(tmp_path / "project", MAKERS[getattr(request, "param", "language")])


def adapter() -> dict[str, Any]:
    (file,) = Path("artifacts/adapters/0.5/raw").glob("*.safetensors")
    return load_file(file)


@pytest.mark.slow
@pytest.mark.parametrize(("project", "shard"), SHARED, indirect=["project"])
def test_a_stage_in_two_processes_leaves_what_it_leaves_in_one(
    project: dict[str, Any], shard: bool
) -> None:
    run_stage("train", 0.5)
    alone, results = adapter(), Path("results/0.5")
    found, cost = read_json(results / "train.json"), read_json(results / "train.cost.json")
    files = sorted(path.name for path in Path("artifacts/adapters/0.5/raw").iterdir())
    write_params(Path.cwd(), {**project, "launch": {"processes": 2, "shard": shard}})
    run_stage("train", 0.5)
    for name, tensor in adapter().items():
        assert float((tensor - alone[name]).abs().max()) < 1e-5  # measured: 5e-7
    assert read_json(results / "train.json") == pytest.approx(found, rel=1e-5)
    together = read_json(results / "train.cost.json")
    assert together.keys() == cost.keys() and together["machine"]["processes"] == 2
    assert together["seconds"] > 0 and together["peak_bytes"] > 2**20
    assert sorted(path.name for path in Path("artifacts/adapters/0.5/raw").iterdir()) == files
    assert not [path for path in Path(".emloc/checkpoints").iterdir() if path.is_dir()]


def train(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The stage as dvc starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.train", "0.5"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_bad_input_in_a_process_is_one_sentence_of_the_stage(project: dict[str, Any]) -> None:
    bad = {**project["train"], "learning_rate": 1e30, "max_grad_norm": 0.0}
    write_params(Path.cwd(), {**project, "train": bad, "launch": {"processes": 2}})
    stage = train(Path.cwd())
    _, errors = stage.communicate(timeout=300)
    assert stage.returncode == 1
    assert errors.splitlines()[-1].startswith("error: ") and "became nan at step" in errors
    assert "Traceback" not in errors and "torch.distributed" not in errors
    assert not Path("artifacts/adapters").exists()


@pytest.mark.slow
def test_a_bug_in_a_process_keeps_its_traceback_and_no_other(project: dict[str, Any]) -> None:
    source = Path("emloc/finetune.py")
    bug = (
        "    from emloc.processes import number\n    watch = [1][number()]\n    watch = StepWatch("
    )
    source.write_text(source.read_text().replace("    watch = StepWatch(", bug))
    write_params(Path.cwd(), {**project, "launch": {"processes": 2}})
    stage = train(Path.cwd())
    _, errors = stage.communicate(timeout=300)
    assert stage.returncode == 1
    last = errors.splitlines()[-1]
    assert last == "error: process 1 of the training failed (IndexError: list index out of range)."
    assert errors.count("Traceback") == 1 and "watch = [1][number()]" in errors


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_stage(project: dict[str, Any], how: signal.Signals) -> None:
    long = {**project["train"], "steps": 10**6, "save_steps": 10**6, "eval_steps": None}
    write_params(Path.cwd(), {**project, "train": long, "launch": {"processes": 2}})
    stage = train(Path.cwd())
    assert stage.stderr is not None
    while "loss=" not in (line := stage.stderr.read(64)):
        assert line
    started = psutil.Process(stage.pid).children(recursive=True)
    assert len(started) >= 2
    stage.send_signal(how)
    assert stage.wait(60) == -how
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


@pytest.mark.slow
def test_two_machines_train_one_adapter_and_the_first_one_keeps_it(
    project: dict[str, Any], tmp_path: Path
) -> None:
    here = Path.cwd()
    run_stage("train", 0.5)
    alone = adapter()
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", str(here), str(other)], check=True)
    network = dict(main_process_ip="127.0.0.1", main_process_port=free_port(), same_network=True)
    for number, folder in enumerate((here, other)):
        subprocess.run(["rm", "-r", str(folder / "artifacts/adapters")], check=True)
        written(folder, num_machines=2, machine_rank=number, **network)
        write_params(folder, {**project, "launch": {"config": "accelerate.yaml"}})
    shared = str(tmp_path / "checkpoints")
    stages = [train(folder, EMLOC_CHECKPOINTS=shared) for folder in (here, other)]
    for stage in stages:
        output, errors = stage.communicate(timeout=300)
        assert stage.returncode == 0, errors
    assert "the first machine, which has the results" in output
    assert not (other / "artifacts/adapters").exists()
    for name, tensor in adapter().items():
        assert float((tensor - alone[name]).abs().max()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("project", ["diffusion"], indirect=True)
def test_a_denoiser_is_not_sharded(project: dict[str, Any]) -> None:
    write_params(Path.cwd(), {**project, "launch": {"processes": 2, "shard": True}})
    with pytest.raises(ValueError, match="launch asks to shard .*: set launch to {processes"):
        run_stage("train", 0.5)
