"""Loading, generating and unloading in several threads: nothing that belongs to the whole process is touched."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.pipelines import adapt, generate, open_pipeline
from torch import nn

THREADS, ROUNDS = 8, 3


@pytest.mark.parametrize("source", ["file", "tensors"])
def test_eight_pipelines_load_generate_and_unload_in_eight_threads(tiny_pipeline_folder, tmp_path, source):
    trained = adapt(open_pipeline(tiny_pipeline_folder), "ether_plus")
    file = trained.save_ether_weights(tmp_path)
    vectors = {name: tensor.clone() for name, tensor in trained.ether_state_dict().items()}
    adapted, bare = generate(trained), generate(open_pipeline(tiny_pipeline_folder))
    pipes = [open_pipeline(tiny_pipeline_folder) for _ in range(THREADS)]
    torch.manual_seed(7)
    before = torch.get_rng_state(), torch.get_default_dtype(), nn.Module.register_parameter, list(warnings.filters)
    start = threading.Barrier(THREADS)

    def work(pipe):
        images = []
        for _ in range(ROUNDS):
            start.wait()
            pipe.load_ether_weights(file if source == "file" else vectors, "dog")
            images.append(generate(pipe))
            pipe.unload_ether_weights()
            images.append(generate(pipe))
        return images

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, pipes))
    for images in found:
        assert all(np.array_equal(image, adapted) for image in images[::2])
        assert all(np.array_equal(image, bare) for image in images[1::2])
    assert torch.equal(torch.get_rng_state(), before[0]) and warnings.filters == before[3]
    assert not any(tensor.is_meta for pipe in pipes for tensor in pipe.unet.parameters())
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.get_default_dtype() == before[1] and nn.Module.register_parameter is before[2]
