"""The server as the command starts it: it stops when what it took is answered."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from helpers.scripts import wait_until
from helpers.server import GENERATIONS, images_of, serving

from ether_diffusion.errors import InputError
from ether_diffusion.server.address import bound_socket


@pytest.fixture
def started(tiny_pipeline_folder, served_adapters_once, tmp_path):
    """Its process, a client, and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = ["--base", str(tiny_pipeline_folder), "--adapters", str(served_adapters_once)]
    command = [sys.executable, "-m", "ether_diffusion.commands.main", "serve", *folders, "--port", str(port)]
    command += ["--max_batch", "8"]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        wait_until(lambda: process.poll() is not None or "startup complete" in log.read_text())
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield process, client, log
    finally:
        process.kill()
        process.wait()


def test_a_server_that_stops_answers_what_it_took(tiny_pipeline):
    with ThreadPoolExecutor(1) as threads:
        with serving(tiny_pipeline) as running:
            body = {"prompt": "a dog", "num_inference_steps": 60}
            answer = threads.submit(httpx.post, f"{running.url}{GENERATIONS}", json=body, timeout=60)
            wait_until(lambda: running.engine.running == 1)
        assert len(images_of(answer.result())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_all_that_it_took_is_answered(started, number):
    process, client, log = started
    assert client.get("/health/ready").status_code == 200
    body = {"prompt": "a dog", "adapter": "dog", "num_inference_steps": 60}
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(httpx.post, f"{client.base_url}{GENERATIONS}", json=body, timeout=60) for _ in "123"]
        wait_until(lambda: "running_requests 3.0" in client.get("/metrics").text, 30)
        client.close()
        process.send_signal(number)
        assert [len(images_of(answer.result())) for answer in answers] == [1, 1, 1]
    assert process.wait(30) == 0, log.read_text()[-2000:]
    assert "Traceback" not in log.read_text()


def test_an_address_in_use_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            InputError, match=f"--port {port}: Address already in use; take another --port, or 0 for any"
        ):
            with bound_socket("127.0.0.1", port):
                pass
