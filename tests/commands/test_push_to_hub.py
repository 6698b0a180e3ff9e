"""export_student.py --push_to_hub makes a repository of an export, and sends nothing anywhere without that flag.

A server on this machine stands in for the hub: huggingface_hub itself talks to it, and it keeps what it is sent.

pytest tests/commands/test_push_to_hub.py
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from test_export_student import save_random_student

import export_student
from support.runs import snapshot

TOKEN = "hf_of_this_test"


class StandIn:
    """What the hub holds: repositories with their visibility, and files by name; `requests` are all that it was asked."""

    def __init__(self):
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refusal: dict[str, int] = {}

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, object]:
        self.requests.append(f"{method} {path}")
        for part, status in self.refusal.items():
            if part in f"{method} {path}":
                return status, {"error": "no"}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "no login"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            self.repositories[repo_id] = asked.get("visibility") == "private" or asked.get("private") is True
            return 200, {"url": f"https://huggingface.co/{repo_id}", "name": repo_id, "id": repo_id}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {
                "commitUrl": "https://huggingface.co/a/b/commit/1",
                "commitOid": "1" * 40,
                "hookOutput": "",
                "success": True,
            }
        if path.startswith("/api/models/"):
            name = path.split("/revision/")[0].removeprefix("/api/models/")
            if name in self.repositories:
                return 200, {"id": name, "sha": "1" * 40, "siblings": []}
            return 404, {"error": "Repository not found"}
        return 200, {}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in that huggingface_hub takes for the hub."""
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = state.answer(
                self.command, self.path.split("?")[0], self.headers.get("Authorization", ""), body
            )
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = do_PUT = reply

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()
    server.server_close()


def use_hub(monkeypatch, address: str) -> None:
    """Let huggingface_hub talk to an address, with a login."""
    made = HfApi.__init__

    def at_address(self, *args, **settings):
        made(self, *args, **{"endpoint": address} | settings)

    monkeypatch.setattr(HfApi, "__init__", at_address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def student(tmp_path) -> Path:
    """A student's folder with a sample picture."""
    save_random_student(tmp_path / "student")
    (tmp_path / "student" / "samples").mkdir()
    for step in (1, 20):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(tmp_path / "student" / "samples" / f"step_{step:06d}.png")
    return tmp_path / "student"


@pytest.fixture
def export(run_main, student, tmp_path):
    def run(export_format: str, *flags: object, output: str = "out"):
        words = ["--student", student, "--format", export_format, "--output", tmp_path / output]
        return run_main(export_student.main, *words, *flags)

    return run


@pytest.mark.parametrize("export_format, output", [("diffusers", "out"), ("original", "mine.safetensors")])
def test_a_private_repository_holds_the_export_its_card_and_the_newest_picture(
    export, hub, student, tmp_path, export_format, output
):
    outcome = export(export_format, "--push_to_hub", "me/wan-student", output=output)
    assert outcome.code == 0, outcome.err
    assert hub.repositories == {"me/wan-student": True} and "which is private" in outcome.out
    place = tmp_path / output
    exported = {file.name: file.read_bytes() for file in ([place] if place.is_file() else place.iterdir())}
    card = ModelCard(hub.files["README.md"].decode())
    picture = "samples/step_000020.png"
    assert hub.files.keys() == exported.keys() | {"README.md", picture}
    assert f"]({picture})" in card.text and card.data.pipeline_tag == "text-to-image"
    assert hub.files[picture] == (student / picture).read_bytes()
    for name, content in exported.items():
        assert name == "README.md" or hub.files[name] == content
    assert ("models/diffusion_models" in card.text) == (export_format == "original")
    assert str(tmp_path) not in card.content


def test_nothing_is_sent_without_the_flag(export, hub):
    assert export("diffusers").code == 0
    assert hub.requests == []


def assert_told(outcome, *parts: str) -> None:
    assert outcome.code == 2 and "Traceback" not in outcome.err and len(outcome.err) < 500
    assert outcome.err.count("\n") == 1 and all(part in outcome.err for part in parts), outcome.err


def test_what_is_there_is_not_replaced(export, hub, tmp_path):
    hub.repositories["me/mine"] = True
    before = snapshot(tmp_path)
    assert_told(export("diffusers", "--push_to_hub", "me/mine"), "me/mine: is there already", "give another name")
    assert hub.files == {} and snapshot(tmp_path) == before


def test_without_a_login_nothing_is_written_or_sent(export, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    before = snapshot(tmp_path)
    assert_told(export("diffusers", "--push_to_hub", "me/mine"), "nobody is logged in", "hf auth login", "HF_TOKEN")
    assert hub.requests == [] and snapshot(tmp_path) == before


def test_a_hub_that_cannot_be_reached_is_one_sentence(export, hub, tmp_path, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9")
    before = snapshot(tmp_path)
    assert_told(export("diffusers", "--push_to_hub", "me/mine"), "the hub cannot be reached", "nothing was written")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("part, status", [("create", 403), ("create", 409), ("commit", 500)])
def test_an_export_that_the_hub_refuses_is_still_here(export, hub, tmp_path, part, status):
    hub.refusal[part] = status
    outcome = export("diffusers", "--push_to_hub", "me/mine")
    assert_told(outcome, "the hub refuses it", str(status), f"hf upload me/mine {tmp_path / 'out'}"[:40])
    assert (tmp_path / "out" / "config.json").is_file() and hub.files == {}
