"""Hot swapping: the vectors of an adapter change, and nothing else of the pipeline."""

import numpy as np
import pytest
import torch
from helpers.pipelines import generate, open_pipeline
from helpers.zoo import strengths


def test_hotswap_changes_the_image_and_nothing_else(trained, tiny_pipeline_folder):
    vectors = trained.ether_state_dict()
    other = {key: tensor.flip(-1) for key, tensor in vectors.items()}
    fresh = open_pipeline(tiny_pipeline_folder)
    fresh.load_ether_weights(other)
    expected = generate(fresh)
    parameters = [id(p) for p in trained.unet.parameters()]
    trained.set_adapters("default", 0.5)
    trained.load_ether_weights(other, hotswap=True)
    assert strengths(trained, "unet", "default") == {0.5}
    trained.set_adapters("default")
    assert np.array_equal(generate(trained), expected)
    assert [id(p) for p in trained.unet.parameters()] == parameters


def test_a_compiled_unet_is_not_compiled_again(trained, tiny_pipeline_folder):
    vectors = trained.ether_state_dict()
    other = {key: tensor.flip(-1) for key, tensor in vectors.items()}
    pipe = open_pipeline(tiny_pipeline_folder)
    pipe.load_ether_weights(vectors, "dog")
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 16, 16))
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with torch.no_grad():
        first = pipe.unet(*inputs).sample
        with torch._dynamo.config.patch(error_on_recompile=True):
            pipe.load_ether_weights(other, "dog", hotswap=True)
            second = pipe.unet(*inputs).sample
        torch._dynamo.reset()
        torch.testing.assert_close(second, pipe.unet._orig_mod(*inputs).sample)
    assert not torch.equal(first, second)


def test_a_hotswap_that_does_not_fit_changes_nothing(trained, tiny_pipeline_folder):
    vectors, picture = trained.ether_state_dict(), generate(trained)
    fewer = {key: tensor for key, tensor in vectors.items() if "mid_block" not in key}
    other_blocks = {key: tensor.reshape(1, -1) for key, tensor in vectors.items()}
    with pytest.raises(ValueError, match="hotswap: .* do not have the same layers, e.g. unet: mid_block"):
        trained.load_ether_weights(fewer, "default", hotswap=True)
    with pytest.raises(ValueError, match="hotswap: .* has vectors .* here, but .*load it under another name"):
        trained.load_ether_weights(other_blocks, "default", hotswap=True)
    with pytest.raises(ValueError, match="hotswap: there is no adapter cat; loaded are default"):
        trained.load_ether_weights(vectors, "cat", hotswap=True)
    trained.fuse_ether()
    with pytest.raises(ValueError, match="hotswap: .* is fused or offloaded"):
        trained.load_ether_weights(vectors, "default", hotswap=True)
    trained.unfuse_ether()
    assert np.array_equal(generate(trained), picture)
