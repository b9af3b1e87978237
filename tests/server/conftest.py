"""A server over the tiny pipeline with four adapters."""

import shutil

import pytest
from helpers.pipelines import open_pipeline
from helpers.server import serving
from helpers.serving import Alone, save_adapters


@pytest.fixture(scope="session")
def served_adapters_once(tmp_path_factory, tiny_pipeline_folder):
    return save_adapters(tmp_path_factory.mktemp("served"), tiny_pipeline_folder)


@pytest.fixture
def adapters(served_adapters_once, tmp_path):
    return shutil.copytree(served_adapters_once, tmp_path / "adapters")


@pytest.fixture(scope="session")
def alone(tiny_pipeline_folder, served_adapters_once):
    """The reference of each request."""
    return Alone(open_pipeline(tiny_pipeline_folder), served_adapters_once)


@pytest.fixture(scope="session")
def server(tiny_pipeline_folder, served_adapters_once):
    """For tests that leave it, and its adapters, as they were."""
    with serving(open_pipeline(tiny_pipeline_folder), served_adapters_once) as running:
        yield running


@pytest.fixture
def own_server(tiny_pipeline, adapters):
    """For tests that change its adapters or stop it."""
    with serving(tiny_pipeline, adapters, uploads=True, max_upload=2**20) as running:
        yield running
