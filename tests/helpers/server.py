"""A server in this process, on a port of its own, and what a client makes of its answers."""

import base64
import io
import socket
import threading
from contextlib import contextmanager

import httpx
import numpy as np
import uvicorn
from helpers.scripts import wait_until
from helpers.serving import Asked
from PIL import Image

from ether_diffusion.server.app import make_app
from ether_diffusion.server.backend import LocalBackend
from ether_diffusion.server.metrics import Metrics
from ether_diffusion.server.settings import ServerSettings
from ether_diffusion.serving import Engine

GENERATIONS = "/v1/images/generations"


class Serving:
    """A running server: `client` asks it, `engine` is what it has inside."""

    def __init__(self, engine: Engine, url: str):
        self.engine, self.url = engine, url
        self.client = httpx.Client(base_url=url, timeout=60)

    def generate(self, **body) -> httpx.Response:
        return self.client.post(GENERATIONS, json={"prompt": "a dog", "num_inference_steps": 2, **body})

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"ether_diffusion_{name}"))


@contextmanager
def serving(pipe, adapters=None, *, max_batch=16, max_line=64, host_bytes=2**31, **settings):
    """An engine, the app over it, and uvicorn on a free port of this machine."""
    with Engine(pipe, adapters, max_batch=max_batch, max_line=max_line, host_bytes=host_bytes) as engine:
        settings = ServerSettings(adapters=adapters, **settings)
        backend = LocalBackend(engine, folder=adapters, hang_after=settings.hang_after)
        app = make_app(backend, settings, Metrics(engine))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started, 30)
        port = server.servers[0].sockets[0].getsockname()[1]
        running = Serving(engine, f"http://127.0.0.1:{port}")
        try:
            yield running
        finally:
            running.client.close()
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def images_of(answer: httpx.Response) -> list[np.ndarray]:
    """The images of an answer, as whole numbers."""
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(each["b64_json"]) for each in answer.json()["data"]]
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=int) for file in files]


def asked(name=None, strength=1.0, **options) -> Asked:
    """What `Alone` makes the reference of; as the server asks, who says nothing of guidance."""
    return Asked(adapter=() if name is None else ((name, strength),), guidance=7.5, **options)


def as_image(reference: np.ndarray) -> np.ndarray:
    """A reference as whole numbers."""
    return (reference[0] * 255).round().astype(int)


def error_of(answer: httpx.Response) -> dict:
    """The error of an answer, which has OpenAI's form."""
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"} and list(answer.json()) == ["error"]
    return error


def settled(running: Serving, seconds: float = 10) -> None:
    """Wait until nothing runs or waits."""
    wait_until(lambda: running.engine.running == 0 and running.engine.waiting == 0, seconds)


@contextmanager
def leaving_client(running: Serving, headers=None, **body):
    """A client that has asked, and leaves at the end without having waited for the answer."""
    content = {"prompt": "a dog", "num_inference_steps": 500, **body}
    request = running.client.build_request("POST", GENERATIONS, json=content)
    with socket.create_connection((request.url.host, request.url.port)) as connection:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        connection.sendall(f"{head}Content-Length: {len(request.content)}\r\n\r\n".encode() + request.content)
        yield
