"""What the server lets through, and the flags of its command."""

import os
from argparse import ArgumentParser
from http.client import HTTPConnection
from pathlib import Path

import gradio
import gradio_client
import httpx
import pytest
from helpers.demo import close, serve_page

from ether_diffusion import miniature
from ether_diffusion.commands.demo import add_arguments, serve
from ether_diffusion.commands.main import main


@pytest.mark.parametrize(
    "path", ["/etc/passwd", str(Path(__file__).resolve()), str(miniature.FOLDER / "model_index.json")]
)
def test_no_other_file_is_served_or_taken_as_an_upload(server, path):
    for prefix in ("/gradio_api/file=", "/file="):
        assert httpx.get(f"{server.local_url.rstrip('/')}{prefix}{path}").status_code in (403, 404)
    # Past the client, which would upload the file first.
    calls = f"{server.local_url}gradio_api/call/check_file"
    data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    event = httpx.post(calls, json=data).json()["event_id"]
    answer = httpx.get(f"{calls}/{event}", timeout=60).text
    assert "event: error" in answer and "event: complete" not in answer


def test_nothing_is_fetched_for_somebody_or_from_elsewhere(server):
    answer = httpx.get(server.local_url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    for tag in ("<script src=", "<link"):
        for part in answer.text.split(tag)[1:]:
            assert "http" not in part.split(">")[0].replace(server.local_url, ""), part[:200]
    assert "fonts.googleapis" not in answer.text
    assert httpx.get(f"{server.local_url}gradio_api/file=http://example.com/a.png").status_code == 403


def test_uploads_are_bounded(server):
    upload = f"{server.local_url}gradio_api/upload"
    assert httpx.post(upload, content=iter([b"of unknown length"])).status_code == 413
    connection = HTTPConnection(server.local_url.split("/")[2])
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("content-length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    for path in ("call/generate", "component_server"):
        answer = httpx.post(f"{server.local_url}gradio_api/{path}", content=iter([b"of unknown length"]))
        assert answer.status_code == 413
    large = {"files": ("a.png", bytes(21_000_000))}
    assert httpx.post(upload, files=large, timeout=60).status_code == 413


def test_who_asks_for_a_password_lets_nobody_else_in(server, tmp_path):
    page = serve_page(tmp_path, auth="ann:secret")
    try:
        assert httpx.get(f"{page.local_url}config").status_code == 401
        assert httpx.post(f"{page.local_url}gradio_api/call/generate", json={"data": []}).status_code == 401
        assert gradio_client.Client(page.local_url, auth=("ann", "secret"), verbose=False, analytics_enabled=False)
    finally:
        close(page)


def test_the_page_is_for_this_machine_unless_flags_say_otherwise(tmp_path, monkeypatch):
    """Gradio's own `launch` is left out here: --share would open a tunnel."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ.get("GRADIO_TEMP_DIR", str(tmp_path)))
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: launched.append(options))
    parser = ArgumentParser()
    add_arguments(parser)
    for k, given in enumerate(([], ["--share", "--host", "0.0.0.0", "--port", "81", "--auth", "ann:se:cret"])):
        (tmp_path / str(k)).mkdir()
        serve(parser.parse_args(given), tmp_path / str(k)).worker.close()
    usual, wide = ([each[k] for k in ("server_name", "server_port", "share", "auth")] for each in launched)
    assert usual == ["127.0.0.1", 7860, False, None]
    assert wide == ["0.0.0.0", 81, True, ("ann", "se:cret")]
    assert all(each["enable_monitoring"] is False for each in launched)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--port", "99999"], "--port 99999: needs a number from 0 to 65535"),
        (["--port", "0", "--auth", "ann"], "--auth: needs a name and a password, as USER:PASSWORD"),
        (["--port", "0", "--base", "no/such/folder"], "no/such/folder"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(given, message, capsys):
    assert main(["demo", *given]) == 1
    assert message in capsys.readouterr().err
