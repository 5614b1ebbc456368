"""Models from a hub: downloaded whole, found again without a network, each refusal in one sentence.

The hub is a small server on this machine that speaks as much of the hub's protocol as is needed.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub.constants
import pytest

from emloc.source import describe, resolve_config, resolve_model
from tests.tiny import save_tiny
from tests.tiny_diffusion import save_tiny_pipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves the files of `folder` as the model org/tiny, at the branch main only."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.gated = False
        self.served: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if path.startswith("/api/models/"):
            self.answer_about(path.removeprefix("/api/models/"))
        else:
            self.send_model_file(path.removeprefix(f"/org/tiny/resolve/{COMMIT}/"))

    def answer_about(self, path: str) -> None:
        if path == f"org/tiny/tree/{COMMIT}":
            files = [file for file in self.server.folder.rglob("*") if file.is_file()]
            self.reply(200, json.dumps([self.entry(file) for file in files]).encode())
        elif path in ("org/tiny", "org/tiny/revision/main", f"org/tiny/revision/{COMMIT}"):
            self.reply(200, json.dumps({"id": "org/tiny", "sha": COMMIT}).encode())
        elif path.startswith("org/tiny/"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})

    def entry(self, file: Path) -> dict[str, object]:
        name = file.relative_to(self.server.folder).as_posix()
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": oid}

    def send_model_file(self, name: str) -> None:
        if self.server.gated:
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        content = (self.server.folder / name).read_bytes()
        if self.command == "GET":
            self.server.served.append(name)
        tag = hashlib.sha1(content).hexdigest()
        self.reply(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


def connect(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Send every request for the hub to a port of this machine."""
    address, constants = f"http://127.0.0.1:{port}", huggingface_hub.constants
    path = constants.HUGGINGFACE_CO_URL_TEMPLATE[len(constants.ENDPOINT) :]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + path)
    monkeypatch.setattr(constants, "ENDPOINT", address)


def disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every request fail: nothing listens at port 9."""
    connect(monkeypatch, 9)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model of several shards, and an empty hub cache on our side."""
    folder = save_tiny("llama", tmp_path / "uploaded", max_shard_size="20KB")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "other.json").write_text("{}")
    server = Hub(folder)
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    connect(monkeypatch, server.server_port)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_configs_of_a_hub_model_come_without_its_weights(hub: Hub) -> None:
    folder = resolve_config("org/tiny")
    assert (folder / "config.json").read_bytes() == (hub.folder / "config.json").read_bytes()
    assert hub.served and not [name for name in hub.served if not name.endswith(".json")]
    with pytest.raises(ValueError, match="The hub has no model org/none"):
        resolve_config("org/none")


def test_a_hub_model_is_downloaded_and_named_by_id_and_commit(hub: Hub) -> None:
    folder = resolve_model("org/tiny", revision="main")
    for file in hub.folder.glob("*.*"):
        if file.suffix != ".bin":
            assert (folder / file.name).read_bytes() == file.read_bytes()
    assert "pytorch_model.bin" not in hub.served and "onnx/other.json" not in hub.served
    pointer = describe("org/tiny", folder, revision="main")
    assert (pointer["name"], pointer["revision"]) == ("org/tiny", COMMIT)
    assert describe(str(hub.folder), hub.folder)["fingerprint"] == pointer["fingerprint"]


def test_a_downloaded_model_is_found_without_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_model("org/tiny")
    hub.served.clear()
    assert resolve_model("org/tiny") == folder and hub.served == []
    disconnect(monkeypatch)
    assert resolve_model("org/tiny") == folder
    assert resolve_model("org/tiny", revision=COMMIT) == folder
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/tiny") == folder


def test_a_half_downloaded_model_is_refused_without_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_model("org/tiny")
    next(folder.glob("model-00002*")).unlink()
    disconnect(monkeypatch)
    with pytest.raises(ValueError, match="org/tiny is only partly downloaded .* try again with a"):
        resolve_model("org/tiny")


def test_no_network_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    disconnect(monkeypatch)
    with pytest.raises(ValueError, match="org/tiny is not in the local hub cache and .* network"):
        resolve_model("org/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="org/tiny is not in the local .* local folder") as caught:
        resolve_model("org/tiny")
    assert "\n" not in str(caught.value)


def test_refusals_of_the_hub_say_what_to_do(hub: Hub) -> None:
    with pytest.raises(ValueError, match="no model org/absent, or it is private: .*hf auth login"):
        resolve_model("org/absent")
    with pytest.raises(ValueError, match="org/tiny has no revision 'v9': give one of its branches"):
        resolve_model("org/tiny", revision="v9")
    with pytest.raises(ValueError, match="'org/a--b' is no valid hub id: write org/name"):
        resolve_model("org/a--b")
    hub.gated = True
    with pytest.raises(ValueError, match="org/tiny is gated: accept its terms .*hf auth login"):
        resolve_model("org/tiny")


def test_a_hub_model_with_pickles_only_is_refused(hub: Hub) -> None:
    for file in hub.folder.glob("model*"):
        file.unlink()
    with pytest.raises(ValueError, match="'org/tiny' has no safetensors weights"):
        resolve_model("org/tiny")
    assert "pytorch_model.bin" not in hub.served


def test_of_a_hub_pipeline_only_what_it_needs_is_downloaded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.folder = save_tiny_pipeline("flux", tmp_path / "p", max_shard_size="200KB")
    for extra in ("flux1-dev.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"):
        (hub.folder / extra).write_bytes(b"the same weights again")
    (hub.folder / "text_encoder" / "flax_model.msgpack").write_bytes(b"another framework's")
    folder = resolve_model("org/tiny")
    every = {p.relative_to(hub.folder).as_posix() for p in hub.folder.rglob("*") if p.is_file()}
    unwanted = {name for name in every if "fp16" in name or "flax" in name or "flux1" in name}
    assert len(unwanted) == 3 and set(hub.served) == every - unwanted
    pointer = describe("org/tiny", folder)
    assert (pointer["name"], pointer["revision"]) == ("org/tiny", COMMIT)
    assert set(pointer["files"]) == every - unwanted
    disconnect(monkeypatch)
    assert resolve_model("org/tiny") == folder


def test_a_hub_pipeline_of_another_class_is_refused_before_its_weights_are_read(
    hub: Hub, tmp_path: Path
) -> None:
    hub.folder = save_tiny_pipeline("flux", tmp_path / "p")
    index = hub.folder / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "SanaPipeline"))
    with pytest.raises(ValueError, match="'SanaPipeline', and those supported are FluxPipeline"):
        resolve_model("org/tiny")
    assert hub.served == ["model_index.json"]
