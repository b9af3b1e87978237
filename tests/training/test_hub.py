"""The way to the Hub: a repository before the training, the files after it."""

import base64
import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.errors import InputError
from ether_diffusion.training.hub import check_hub, log_patterns, upload
from ether_diffusion.training.options import RunOptions
from ether_diffusion.training.trackers import PROJECT


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs. "me" owns one namespace; token "reader" may not write."""

    def do_GET(self):
        if self.token is None or self.path == "/api/whoami-v2" and self.token == "stale":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "auth": {}})
        if self.path.endswith("/auth-check/write"):
            return self.answer(200 if self.may_write(self.path.split("/")[3]) else 403, {"error": "no write access"})
        if self.path == "/api/models/them/theirs":  # to be seen by everyone
            return self.answer(200, {"id": "them/theirs", "siblings": []})
        self.answer(404, {"error": "Repository not found"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if not self.may_write(asked["organization"]):
                return self.answer(403, {"error": "no right to create here"})
            repo_id = f"{asked['organization']}/{asked['name']}"
            known = repo_id in self.server.repositories
            self.server.repositories.setdefault(repo_id, {})
            return self.answer(409 if known else 200, {"url": f"{self.server.address}/{repo_id}"})
        _, _, _, owner, name, action, _ = self.path.split("?")[0].split("/")
        if not self.may_write(owner):
            return self.answer(403, {"error": "no write access"})
        if action == "preupload":
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            return self.answer(200, {"files": modes})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[f"{owner}/{name}"][line["value"]["path"]] = content
            else:
                self.server.commits.append(line["value"]["summary"])
        url = f"{self.server.address}/{owner}/{name}/commit/{'0' * 40}"
        self.answer(200, {"commitUrl": url, "commitOid": "0" * 40})

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def may_write(self, owner: str | None) -> bool:
        return owner == "me" and self.token == "writer"

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def go_online(monkeypatch, tmp_path, address: str, token: str | None) -> None:
    """What HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN_PATH set when the Hub's library is imported, and HF_TOKEN."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


@contextlib.contextmanager
def serve():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.address = f"http://127.0.0.1:{server.server_port}"
        server.repositories, server.commits = {}, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve() as server:
        go_online(monkeypatch, tmp_path, server.address, "writer")
        yield server


def run_options(folder: Path | str, hub_model_id: str | None = None, **fields) -> RunOptions:
    return RunOptions(output_dir=str(folder), push_to_hub=True, hub_model_id=hub_model_id, **fields)


def test_without_push_to_hub_nobody_is_asked(hub, tmp_path):
    assert check_hub(RunOptions(output_dir=str(tmp_path))) is None
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("given", "repo_id"), [(None, "me/dog"), ("cat", "me/cat"), ("me/cat", "me/cat")], ids=["folder", "name", "id"]
)
def test_the_repository_is_there_before_the_training(hub, tmp_path, given, repo_id):
    run = run_options(tmp_path / "dog", given)
    assert check_hub(run) == repo_id
    assert check_hub(run) == repo_id  # of a second run
    assert hub.repositories == {repo_id: {}}


@pytest.mark.parametrize(
    ("token", "given", "words"),
    [
        (None, None, "^--push_to_hub with --output_dir .*no token.*`hf auth login`"),
        ("stale", None, "^--push_to_hub with --output_dir .*does not accept the token.*`hf auth login --force`"),
        ("reader", "cat", "^--hub_model_id cat: the token may not write to cat .*write access"),
        ("writer", "them/new", "^--hub_model_id them/new: the token may not write to them/new"),
        ("writer", "them/theirs", "^--hub_model_id them/theirs: the token may not write to them/theirs"),
        ("writer", "a dog", "^--hub_model_id a dog: 'a dog' is no repository id.*namespace/name"),
        ("writer", "a/b/c", "^--hub_model_id a/b/c: 'a/b/c' is no repository id"),
    ],
)
def test_what_would_fail_after_the_training_fails_before_it(hub, tmp_path, monkeypatch, token, given, words):
    go_online(monkeypatch, tmp_path, hub.address, token)
    with pytest.raises(InputError, match=words):
        check_hub(run_options(tmp_path / "dog", given))
    assert hub.repositories == {}


def test_a_hub_out_of_reach_is_an_error_of_the_user(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        go_online(monkeypatch, tmp_path, address, "writer")
        with pytest.raises(InputError, match=f"{address} is out of reach"):
            check_hub(run_options("dog"))  # nobody listens at the port, and nobody else gets it meanwhile
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        check_hub(run_options("dog"))


CARD = b"---\ntags:\n- diffusers\n---\n\n# A card\n"


def fill(folder: Path, *paths: str) -> dict[str, bytes]:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode() * 3)
    return {path: path.encode() * 3 for path in paths}


def test_what_the_run_leaves_arrives_without_checkpoints_logs_and_hidden_files(hub, tmp_path):
    folder = tmp_path / "dog"
    left = fill(folder, WEIGHTS_NAME, "grid.png", "unet/config.json", "a.logs")
    fill(folder, "checkpoint-5/state.pt", "checkpoint-10.tmp/state.pt", ".hidden", "unet/.DS_Store")
    fill(folder, "logs/ether-diffusion/events", "logs/wandb/run/x")
    (folder / "README.md").write_bytes(CARD)  # the Hub is asked whether its header is valid
    left["README.md"] = CARD
    run = run_options(folder)
    repo_id = check_hub(run)
    assert upload(folder, repo_id, ignore=log_patterns(run)) == f"{hub.address}/me/dog"
    assert hub.repositories == {"me/dog": left}
    assert hub.commits == ["Upload the result of the training"]


def test_logs_are_left_out_wherever_they_are(hub, tmp_path):
    folder = tmp_path / "dog"
    outside = run_options(folder, logging_dir=str(tmp_path / "elsewhere"))
    assert log_patterns(outside) == ()
    for logging_dir, logs in (("a/[logs]", "a/[logs]"), (".", PROJECT), (str(folder / "own"), "own")):
        left = fill(folder, "grid.png", "wandb.txt", "a/l")
        fill(folder, f"{logs}/events")
        run = run_options(folder, logging_dir=logging_dir)
        upload(folder, check_hub(run), ignore=log_patterns(run))
        assert hub.repositories == {"me/dog": left}
        (folder / logs / "events").unlink()


def test_a_failed_upload_says_how_to_repeat_it(hub, tmp_path):
    folder = tmp_path / "dog"
    fill(folder, WEIGHTS_NAME)
    with pytest.raises(
        OSError, match=r"dog is complete, but (.|\n)*to repeat it: hf upload them/theirs .*dog \. --exclude"
    ):
        upload(folder, "them/theirs")
