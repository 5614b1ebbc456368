"""Emulators shared in a team: over a folder, over S3, by dvc alone; and what a remote lacks."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.core import set_initial_no_auth_action_count
from moto.server import ThreadedMotoServer

from tests.project import write_params
from tests.shell import check_cache, clone, commit, dvc, lock, ran, read_params, run

pytestmark = pytest.mark.slow
pytest_plugins = "tests.reproduced"


def share(folder: Path, *arguments: str, **more: str) -> str:
    """Run `python -m flows.share`; what it printed."""
    done = run(folder, "flows.share", *arguments, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def emulators(folder: Path, *arguments: str, **more: str) -> list[dict[str, Any]]:
    """What `python -m flows.share list` tells."""
    return json.loads(share(folder, "list", "--json", *arguments, **more))


def refusal(folder: Path, *arguments: str, **more: str) -> str:
    """Run `python -m flows.share`, which fails: the one sentence that it says."""
    done = run(folder, "flows.share", *arguments, **more)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def ahead(reproduced: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished project with parameters that are not committed; no test changes it."""
    folder = shutil.copytree(reproduced, tmp_path_factory.mktemp("ahead") / "project")
    params = read_params(folder)
    params["ratios"] = [0.5]
    params["correct"]["limit"] = 1
    write_params(folder, params)
    assert ran(dvc(folder, "repro")) == {"correct@0.5", "evaluate@0.5", "report"}
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server that speaks S3; its URL."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def account(server: str) -> dict[str, str]:
    """The environment of someone who may use the server."""
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "team",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_MAX_ATTEMPTS": "1",
    }


@pytest.fixture(params=["folder", "s3"])
def remote(
    request: pytest.FixtureRequest, server: str, tmp_path: Path
) -> tuple[str, dict[str, str]]:
    """URL of an empty remote, and the environment that it needs."""
    if request.param == "folder":
        return str(tmp_path / "remote"), {}
    name = f"bucket-{tmp_path.name.replace('_', '-').lower()}"[:60].strip("-")
    boto3.client(
        "s3", endpoint_url=server, aws_access_key_id="team", aws_secret_access_key="secret",
        region_name="us-east-1",
    ).create_bucket(Bucket=name)  # fmt: skip
    return f"s3://{name}/emulators", account(server)


def test_a_teammate_gets_what_is_not_committed_without_computing_anything(
    ahead: Path, tmp_path: Path, remote: tuple[str, dict[str, str]]
) -> None:
    url, env = remote
    first = shutil.copytree(ahead, tmp_path / "first")
    dvc(first, "remote", "add", "-d", "team", url)
    share(first, "push", **env)

    second = clone(first, tmp_path / "second", read_params(first))
    dvc(second, "remote", "add", "-d", "team", url)
    printed = share(second, "pull", **env)
    assert "gave the results of 12 stages; nothing was computed" in printed
    assert lock(second) == {name: lock(first)[name] for name in lock(second)}
    assert (second / "artifacts/emulators/0.5/model.safetensors").exists()
    assert "original + corrected" in (second / "report/report.md").read_text()
    assert check_cache(second / ".dvc/cache") > 50
    assert not ran(dvc(second, "repro"))

    # Pushed files are those of dvc.lock only; the record of the runs names more.
    third = clone(first, tmp_path / "third")
    dvc(third, "remote", "add", "-d", "team", url)
    assert [one["ratio"] for one in emulators(third, "--remote", url, **env)] == ["0.5"]
    said = refusal(third, "pull", **env)
    assert "does not have compress@0.8 and correct@0.5 for the present params.yaml" in said
    assert (third / "artifacts/emulators/0.5/model.safetensors").exists()
    check_cache(third / ".dvc/cache")


def test_plain_dvc_gives_a_teammate_everything_too(ahead: Path, tmp_path: Path) -> None:
    first = shutil.copytree(ahead, tmp_path / "first")
    dvc(first, "remote", "add", "-d", "team", str(tmp_path / "remote"))
    commit(first)
    dvc(first, "push")
    second = clone(first, tmp_path / "second")
    assert not ran(dvc(second, "repro", "--pull"))
    assert "original + corrected" in (second / "report/report.md").read_text()

    dvc(first, "push", "--run-cache")
    third = clone(first, tmp_path / "third")
    (third / "dvc.lock").unlink()
    assert not ran(dvc(third, "repro", "--pull"))


def test_pull_computes_nothing_and_takes_nothing_away(project: Path, tmp_path: Path) -> None:
    share(project, "push", "--remote", str(tmp_path / "remote"))
    params = read_params(project)
    params["train"]["lora"]["r"] = 4
    write_params(project, params)
    before = set((project / "artifacts").rglob("*"))
    lock_before = lock(project)
    said = refusal(project, "pull")
    assert "does not have train@0.8, train@0.5 and direct for the present params.yaml" in said
    assert "`dvc repro --pull train@0.8`" in said
    assert set((project / "artifacts").rglob("*")) == before
    assert lock(project) == lock_before

    other = clone(project, tmp_path / "other", params)
    said = refusal(other, "pull", "compress@0.5", "train@0.5", "--remote", str(tmp_path / "remote"))
    assert "does not have train@0.5 for" in said and "6 other stages were pulled" in said
    assert (other / "artifacts/emulators/0.5/model.safetensors").exists()
    assert not (other / "artifacts/adapters").exists()


def test_a_stage_that_ran_twice_is_shared_as_dvc_lock_names_it(
    project: Path, tmp_path: Path
) -> None:
    first = lock(project)["compress@0.5"]
    dvc(project, "repro", "--force", "--single-item", "compress@0.5")
    assert lock(project)["compress@0.5"] != first  # its cost is measured again
    cost = first["outs"][1]
    assert cost["path"].endswith("cost.json")
    (project / ".dvc/cache/files/md5" / cost["md5"][:2] / cost["md5"][2:]).unlink()
    remote = tmp_path / "remote"
    share(project, "push", "--remote", str(remote))
    records = [path.read_text() for path in (remote / "runs").rglob("*") if path.is_file()]
    assert sum("tasks.compress 0.5" in text for text in records) == 1

    second = clone(project, tmp_path / "second")
    share(second, "pull", "compress@0.5", "--remote", str(remote))
    assert lock(second)["compress@0.5"] == lock(project)["compress@0.5"]


def test_files_that_are_nowhere_are_told(project: Path, tmp_path: Path) -> None:
    adapter = lock(project)["train@0.5"]["outs"][0]["md5"]
    (project / ".dvc/cache/files/md5" / adapter[:2] / adapter[2:]).unlink()
    said = refusal(project, "push", "--remote", str(tmp_path / "remote"))
    assert "but for some files that are no longer in the cache" in said
    dvc(project, "repro")
    share(project, "push")


def test_the_list_tells_what_is_here_and_what_is_there(project: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "remote")
    share(project, "push", "--remote", url)
    params = read_params(project)
    params["compress"]["targets"] = {r".*mlp.*": 0.3, **params["compress"]["targets"]}
    params["ratios"] = [0.5]
    write_params(project, params)
    dvc(project, "repro", "compress@0.5")

    listed = {one["hash"]: one for one in emulators(project, "--remote", url)}
    assert len(listed) == 3
    now = listed[lock(project)["compress@0.5"]["outs"][0]["md5"]]
    assert (now["ratio"], now["current"], now["here"], now["there"]) == ("0.5", True, True, False)
    assert now["targets"] == params["compress"]["targets"]
    files = [path for path in (project / "artifacts/emulators/0.5").rglob("*") if path.is_file()]
    assert now["size"] == sum(path.stat().st_size for path in files)
    assert now["data"] == params["data"]["source"]
    pointer = json.loads((project / "artifacts/model.json").read_text())
    assert now["model"] == pointer["name"]
    others = [one for one in listed.values() if one is not now]
    assert all(one["here"] and one["there"] and not one["current"] for one in others)
    assert {one["ratio"] for one in others} == {"0.5", "0.8"}

    other = clone(project, tmp_path / "other")
    assert emulators(other) == []
    there = {one["hash"]: one for one in emulators(other, "--remote", url)}
    assert there.keys() == {one["hash"] for one in others}
    assert all(one["there"] and one["current"] and not one["here"] for one in there.values())

    weights = json.loads(stored(project, now["hash"]).read_text())
    stored(project, weights[-1]["md5"]).unlink()
    assert now["hash"] not in {one["hash"] for one in emulators(project)}
    gone = {one["hash"] for one in emulators(project, "--all") if not one["here"]}
    assert now["hash"] in gone


def stored(folder: Path, hash: str) -> Path:
    """Where an object lies in a project's cache."""
    return folder / ".dvc/cache/files/md5" / hash[:2] / hash[2:]


def test_a_remote_that_refuses_is_one_sentence(project: Path, server: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    said = refusal(project, "push", "--remote", str(file))
    assert f"The remote ({file}) did not take everything: " in said
    assert "Not a directory" in said and "Nothing is lost" in said
    said = refusal(project, "pull", "--remote", str(tmp_path / "none"))
    assert "holds nothing" in said

    nobody = account("http://127.0.0.1:9")
    for arguments in (["push"], ["pull"], ["list"]):
        said = refusal(project, *arguments, "--remote", "s3://bucket/emulators", **nobody)
        assert "The remote (s3://bucket/emulators) cannot be used: Could not connect" in said
    said = refusal(project, "push", "--remote", "s3://bucket/emulators", **account(server))
    assert "bucket does not exist" in said

    refusal_to_strangers = set_initial_no_auth_action_count(0)(refusal)
    for arguments in (["push"], ["pull"], ["list"]):
        said = refusal_to_strangers(
            project, *arguments, "--remote", "s3://bucket/emulators", **account(server)
        )
        assert "cannot be used: The AWS Access Key Id you provided does not exist" in said
    said = refusal(project, "push", "--remote", "http://127.0.0.1:9/emulators")
    assert "did not take everything: Cannot connect to host 127.0.0.1:9" in said


def test_experiments_are_run_at_once_or_queued_and_listed_with_their_metrics(
    ahead: Path, tmp_path: Path
) -> None:
    project = shutil.copytree(ahead, tmp_path / "project")
    commit(project)
    stages = {"train@0.5", "correct@0.5", "evaluate@0.5"}
    printed = dvc(project, "exp", "run", "-S", "train.lora.r=4", "-n", "small", "evaluate@0.5")
    assert ran(printed) == stages

    for limit in ("2", "1000000"):  # from the workspace as the first experiment left it
        value = f"correct.limit={limit}"
        dvc(project, "exp", "run", "--queue", "-S", value, "-n", f"limit-{limit}", "correct@0.5")
    try:
        dvc(project, "exp", "run", "--run-all")
    finally:
        dvc(project, "queue", "stop", "--kill")
    assert read_params(project)["correct"]["limit"] == 1

    shown = csv.DictReader(dvc(project, "exp", "show", "--csv").splitlines())
    rows = {row["Experiment"]: row for row in shown}
    names = ["small", "limit-2", "limit-1000000"]
    assert [rows[name]["train.lora.r"] for name in names] == ["4", "4", "4"]
    assert [rows[name]["correct.limit"] for name in names] == ["1", "2", "1000000"]
    assert float(rows["small"]["original-corrected.loss"]) > 0
    assert [float(rows[name]["clamped"]) for name in names] == [1, 1, 0]
