"""`--push-to-hub` through the real client, against a stand-in for the hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from export_toys import PRUNED, trained
from huggingface_hub import constants
from recipes_cli import run_recipe
from tiny import tiny_processor
from training_toys import save_tiny

from himap_train.checkpoints.export import export_merged
from himap_train.checkpoints.hub import push_to_hub, require_hub
from himap_train.checkpoints.load import save_adapter


class Hub(ThreadingHTTPServer):
    """What the client asks of the hub for one commit; weights go through the large-file protocol, the rest inline."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.token = "hf_of_a_test"
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.failing: str | None = None


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        content = self.body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self) -> None:
        if "/tree/main" in self.path:
            listed = [{"type": "file", "path": name, "oid": "0", "size": 1} for name in self.server.files]
            return self.answer(listed)
        self.answer({"error": "Repository not found"}, 404)

    def do_POST(self) -> None:
        body = self.body()
        if self.server.failing and self.server.failing in self.path:
            self.answer({"error": "the stand-in fails"}, 403)
        elif self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            private = asked.get("private") or asked.get("visibility") == "private"  # as older and newer clients say it
            self.server.private[f"{asked.get('organization', 'me')}/{asked['name']}"] = bool(private)
            self.answer({"url": f"{self.server.url}/me/model", "id": "me/model"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            kinds = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": n, "uploadMode": kind, "shouldIgnore": False, "oid": None} for n, kind in kinds.items()]
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            upload = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": upload})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.answer({})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.server.files[value["path"]]
        self.answer({"commitUrl": f"{self.server.url}/me/model/commit/abc", "commitOid": "abc", "success": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a binary protocol of its own, not stood in for here
    monkeypatch.setenv("HF_TOKEN", server.token)
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_tiny(tmp_path_factory.mktemp("base"))
    return save_adapter(trained(base), tmp_path_factory.mktemp("run") / "adapter", PRUNED, tiny_processor())


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_export_uploads_every_file(hub: Hub, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--checkpoint", adapter, "--output", tmp_path / "out", "--no-check", "--max-shard-size", "100KB")
    assert run_recipe("export", *options, "--push-to-hub", "me/model", "--private") == 0
    assert f"uploaded to {hub.url}/me/model/commit/abc" in capsys.readouterr().out
    sent = dict(hub.files)
    sent.pop(".gitattributes", None)
    assert sent == content(tmp_path / "out")
    assert len([name for name in sent if name.endswith(".safetensors")]) == 4
    assert hub.private == {"me/model": True}


def test_a_second_upload_leaves_nothing_of_the_first_that_loaders_would_take(
    hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    push_to_hub(export_merged(adapter, tmp_path / "one"), "me/model", private=False)
    hub.files |= {"notes.md": b"mine", "himap/ranking.safetensors": b"old", "himap/notes.md": b"mine"}
    shards = export_merged(adapter, tmp_path / "two", max_shard_size="100KB")
    push_to_hub(shards, "me/model", private=False)
    assert "model.safetensors" not in hub.files and "himap/ranking.safetensors" not in hub.files
    kept = {name: value for name, value in hub.files.items() if name != ".gitattributes"}
    assert kept == {"notes.md": b"mine", "himap/notes.md": b"mine", **content(shards)}
    push_to_hub(adapter, "me/model", private=False)  # beside a whole model, which stays
    assert kept.keys() | content(adapter).keys() == hub.files.keys() - {".gitattributes"}


def test_public_unless_asked(hub: Hub, adapter: Path) -> None:
    push_to_hub(adapter, "me/model", private=False)
    assert hub.private == {"me/model": False}


@pytest.mark.parametrize("failing", ["/api/repos/create", "/commit/"])
def test_folder_stays_where_the_hub_refuses(
    hub: Hub, adapter: Path, tmp_path: Path, failing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.failing = failing
    options = ("--checkpoint", adapter, "--output", tmp_path / "out", "--no-check", "--push-to-hub", "me/model")
    assert run_recipe("export", *options) == 2
    said = capsys.readouterr().err
    assert "is complete, but could not be uploaded to me/model" in said and "403" in said
    assert f"hf upload me/model {tmp_path / 'out'}" in said
    assert (tmp_path / "out/model.safetensors").is_file() and hub.files == {}


def test_wrong_token_and_no_network(hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "folder"))
    hub.token = "another"
    with pytest.raises(ConnectionError, match="could not be uploaded to me/model.*401"):
        push_to_hub(folder, "me/model", private=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="could not be uploaded to me/model: .*refused"):
        push_to_hub(folder, "me/model", private=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        push_to_hub(folder, "me/model", private=False)
    assert content(folder) == content(adapter)


def test_name_and_token_are_looked_at_before_anything_is_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    options = ("--checkpoint", adapter, "--output", tmp_path / "out", "--push-to-hub")
    for name, message in (("me/model", "hf auth login"), ("model", "expected owner/name"), ("a/b/c", "no name on the")):
        assert run_recipe("export", *options, name) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    require_hub("me/model")
