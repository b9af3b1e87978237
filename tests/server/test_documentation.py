"""The examples in docs/serving-http.md, run as they stand there."""

import os
import re
import shutil
import subprocess

import pytest
from helpers.scripts import ROOT

PAGE = (ROOT / "docs" / "serving-http.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_commands_succeed(own_server, adapters, tmp_path):
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [line.replace(ADDRESS, own_server.url) for line in commands if line.startswith("curl")]
    assert len(commands) == 5
    for command in commands:
        variables = {**os.environ, "no_proxy": "127.0.0.1"}
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, command + done.stdout + done.stderr
    assert '"b64_json"' in (tmp_path / "answer.json").read_text()
    assert (tmp_path / "two.json").read_text().count('"b64_json"') == 2
    assert not (adapters / "dog2.safetensors").exists()


def test_the_example_of_openais_client_writes_an_image(server, tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="OpenAI's client is not installed")
    (example,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace(ADDRESS, server.url), "example", "exec"), {})
    assert (tmp_path / "dog.png").read_bytes().startswith(b"\x89PNG")
