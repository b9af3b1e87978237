"""A server that runs for weeks: what is done leaves nothing behind, without waiting for the garbage collector."""

import gc
import sys
import weakref

import pytest
import torch
from helpers.bounds import within_bounds
from helpers.pipelines import open_pipeline
from helpers.scripts import wait_until
from helpers.serving import NAMES, WAIT, Asked, save_adapters
from safetensors.torch import save_file

from ether_diffusion.analysis.effect import _lora_file
from ether_diffusion.serving import Engine
from ether_diffusion.serving.lora_file import find_lora_file
from ether_diffusion.serving.rows import AdapterRows


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_pipeline_folder):
    return save_adapters(tmp_path_factory.mktemp("adapters"), tiny_pipeline_folder)


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_request_that_is_done_and_its_images_go_with_the_last_who_holds_them(tiny_pipeline, adapters, no_collector):
    with Engine(tiny_pipeline, adapters, max_batch=4) as engine:
        jobs = [Asked(adapter=((name, 1.0),)).submit(engine) for name in NAMES]
        references = [weakref.ref(each) for job in jobs for each in (job, job.result(WAIT), job.request.scheduler)]
        del jobs
        wait_until(lambda: not any(each() for each in references), 10)


def test_a_cancelled_request_goes_as_well(tiny_pipeline, no_collector):
    with Engine(tiny_pipeline, max_batch=1) as engine:
        jobs = [engine.submit(prompt="a dog", num_inference_steps=500)]
        wait_until(lambda: jobs[0].progress.step > 1, 60)
        references = [weakref.ref(jobs[0]), weakref.ref(jobs[0].request.scheduler)]
        jobs.pop().cancel()
        wait_until(lambda: not any(each() for each in references), 10)


def test_adapters_that_are_read_again_and_again_leave_nothing_behind(tiny_pipeline_folder, adapters):
    rows = AdapterRows(open_pipeline(tiny_pipeline_folder), max_rows=1)

    def blocks_after(reads: int) -> int:
        for _ in range(reads):
            for name in NAMES:
                rows.read(adapters / f"{name}.safetensors")
        gc.collect()
        return sys.getallocatedblocks()

    before = blocks_after(3)
    assert blocks_after(10) - before < 40 * len(NAMES)  # of 32 bytes or so; each file has 20 and more vectors
    rows.close()


def test_looking_whether_a_large_file_is_a_lora_costs_none_of_its_size(tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"unet.a.lora_A.weight": torch.zeros(1 << 25)}, path)
    for look in (find_lora_file, _lora_file):
        look(tmp_path)  # what is imported for it is not the file's
        with within_bounds(0):
            assert look(tmp_path) == path
