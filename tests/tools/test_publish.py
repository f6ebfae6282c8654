"""The commands of docs/publishing.md: a model goes to a hub, and predict takes it from there."""

import base64
import json
import os
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from support import ROOT, load_script

NAME, COMMIT = "someone/finetune_siglip", "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as uploads and downloads of small files ask for."""

    files: ClassVar[dict[str, bytes]] = {}
    created: ClassVar[list[dict]] = []

    @property
    def url(self) -> str:
        return f"http://{self.headers['Host']}/{NAME}"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]
            ]
            self.answer({"files": [f | {"shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.url}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            if self.path == "/api/repos/create":
                self.created.append(json.loads(body))
            self.answer({"url": self.url, "name": NAME})

    def do_GET(self):
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        if name:
            return self.send(self.files.get(name), {"ETag": f'"{hash(self.files.get(name))}"'})
        listed = [{"rfilename": name} for name in self.files]
        tree = [
            {"type": "file", "path": p, "size": len(x), "oid": "b"} for p, x in self.files.items()
        ]
        found = {"id": NAME, "sha": COMMIT, "siblings": listed, "private": True, "tags": []}
        return self.answer(tree if "/tree/" in self.path else found | {"name": "someone"})

    do_HEAD = do_GET

    def answer(self, content) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, content: bytes | None, headers: dict) -> None:
        self.send_response(200 if content is not None else 404)
        for key, value in {"X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content or b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def commands() -> list[str]:
    text = (ROOT / "docs/publishing.md").read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.startswith("    hf ")]


def test_a_model_is_published_and_comes_back_the_same(hub, tmp_path):
    model = tmp_path / "models/finetune_siglip"
    (tmp_path / "metrics").mkdir(parents=True)
    (tmp_path / "metrics/model_card.md").write_text("# Card\n")
    model.mkdir(parents=True)
    load_script("data/make_checkpoints.py").make_siglip(model, 32, 8)
    written = {path.name: path.read_bytes() for path in model.iterdir()}
    where = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands():
        done = subprocess.run(
            shlex.split(command),
            cwd=tmp_path,
            env=os.environ | where | {"PATH": path, "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert Hub.created[0].get("private") or Hub.created[0].get("visibility") == "private"
    fetched = tmp_path / "models/fetched"
    assert {name: (fetched / name).read_bytes() for name in written} == written
    assert (fetched / "README.md").read_text() == "# Card\n"
