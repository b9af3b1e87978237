"""A worker on a folder of adapters, and the served page; one of each for this folder."""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio_client")

from helpers.browser import chromium, opener  # noqa: E402
from helpers.demo import MAX_BATCH, close, connect, serve_page  # noqa: E402

from ether_diffusion import miniature  # noqa: E402
from ether_diffusion.commands.demo import SHIPPED  # noqa: E402
from ether_diffusion.control.classes import EtherControlPipeline  # noqa: E402
from ether_diffusion.control.encoder import ControlEncoder  # noqa: E402
from ether_diffusion.demo.library import Library  # noqa: E402
from ether_diffusion.demo.worker import Worker  # noqa: E402


@pytest.fixture(scope="package")
def adapters(tmp_path_factory) -> Path:
    """A folder with the shipped adapters, a control adapter, and a file that is none."""
    folder = shutil.copytree(SHIPPED, tmp_path_factory.mktemp("adapters"), dirs_exist_ok=True)
    torch.manual_seed(0)
    pipe = EtherControlPipeline.from_pipe(miniature.load_pipeline())
    encoder = ControlEncoder.for_denoiser(pipe.unet, factor=pipe.vae_scale_factor)
    torch.nn.init.normal_(encoder.embedding.conv_out.weight, std=0.2)
    pipe.add_control("map", encoder)
    pipe.save_ether_weights(folder / "map", "map")
    (folder / "broken.safetensors").write_bytes(b"no adapter")
    return folder


@pytest.fixture(scope="package")
def worker(adapters):
    worker = Worker(miniature.FOLDER, Library(adapters), device="cpu", max_batch=MAX_BATCH)
    yield worker
    worker.close()


@pytest.fixture(scope="package")
def server(tmp_path_factory):
    page = serve_page(tmp_path_factory.mktemp("served"))
    yield page
    close(page)


@pytest.fixture
def client(server):
    return connect(server)


@pytest.fixture(scope="package")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser, server):
    with opener(browser, server.local_url) as open_page:
        yield open_page
