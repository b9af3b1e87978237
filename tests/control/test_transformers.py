"""Light control of transformers: what is added where, and what the pipelines generate with it."""

import numpy as np
import pytest
import torch
from helpers.flow_control import IMAGE, NAMES, conv_encoder, latent_encoder, make_control
from helpers.flow_images import generate
from helpers.flow_zoo import make
from torch import nn

from ether_diffusion import EtherConfig, control_pipeline_class
from ether_diffusion.control.images import control_tensor
from ether_diffusion.control.pipelines import latents_of, over
from ether_diffusion.control.projection import first_projection
from ether_diffusion.latents import LatentSpace
from ether_diffusion.training.families import family_of

CLOSE = 2e-5
TWO_CALLS = {"flux": {"negative_prompt": "cat", "true_cfg_scale": 3.0}, "qwen": {"negative_prompt": "cat"}}
"""Where guidance has a call of its own only if it is asked for."""


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def plain(name, tmp_path):
    return make_control(name, tmp_path)


class Widened(nn.Module):
    """The first projection with more columns, [W | E], of which the new ones see the control image."""

    def __init__(self, layer: nn.Module, columns: torch.Tensor, control: torch.Tensor):
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.wide = nn.Conv2d(
                2 * layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, bias=layer.bias is not None
            )
            columns = columns.view_as(layer.weight)
        else:
            self.wide = nn.Linear(2 * layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.wide.weight.data = torch.cat([layer.weight.data, columns], dim=1)
        if layer.bias is not None:
            self.wide.bias.data = layer.bias.data
        self.control, self.axis = control, 1 if isinstance(layer, nn.Conv2d) else -1

    def forward(self, latents):
        control = self.control.repeat(len(latents) // len(self.control), *[1] * (latents.ndim - 1))
        return self.wide(torch.cat([latents, control], dim=self.axis))


def seen_by_projection(stock, latents):
    """What the transformer's own first projection is given of latents."""
    family, seen = family_of(stock), []
    hook = first_projection(stock.transformer).hooked.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        family.predict(latents, torch.tensor([0.5]), family.conditioning(["a dog"]))
    hook.remove()
    return seen[0].detach()


def test_an_encoder_of_latents_is_the_widened_projection(name, tmp_path):
    """The dense definition: channels concatenated, [W | E] in place of W."""
    stock = make(name, tmp_path)
    pipe = over(control_pipeline_class(type(stock)), stock)
    pipe.set_progress_bar_config(disable=True)
    encoder = latent_encoder(pipe)
    options = TWO_CALLS.get(name, {})
    plain = generate(pipe, **options)
    pipe.add_control("edges", encoder)
    ours = generate(pipe, control_image=IMAGE, **options)
    pipe.unload_ether_weights()
    latents = latents_of(LatentSpace(lambda: stock.vae), control_tensor(IMAGE, height=32, width=32))
    projection = first_projection(stock.transformer)
    wide = Widened(projection.layer, encoder.projection.weight.data, seen_by_projection(stock, latents))
    parent, _, child = projection.layout.path.rpartition(".")
    stock.transformer.get_submodule(parent)._modules[child] = wide
    dense = generate(stock, **options)
    assert np.abs(ours - dense).max() < CLOSE and np.abs(ours - plain).max() > 100 * CLOSE


@pytest.mark.parametrize("make_encoder", [latent_encoder, conv_encoder], ids=["latent", "conv"])
def test_an_untrained_encoder_and_strength_0_are_the_base_bit_for_bit(name, plain, tmp_path, make_encoder):
    stock = generate(make(name, tmp_path))
    assert np.array_equal(generate(plain), stock)
    encoder = make_encoder(plain, seed=None)
    plain.add_control("edges", encoder)
    assert np.array_equal(generate(plain, control_image=IMAGE), stock)
    plain.delete_adapters("edges")
    plain.add_control("edges", make_encoder(plain))
    assert np.array_equal(generate(plain), stock)
    assert np.array_equal(generate(plain, control_image=IMAGE, controlnet_conditioning_scale=0.0), stock)
    plain.set_adapters("edges", 0.0)
    assert np.array_equal(generate(plain, control_image=IMAGE), stock)
    plain.set_adapters("edges")
    assert np.abs(generate(plain, control_image=IMAGE) - stock).max() > 100 * CLOSE
    plain.unload_ether_weights()
    assert np.array_equal(generate(plain), stock) and not first_projection(plain.transformer).hooked._forward_hooks
    assert not plain.controls and not any("ether" in name for name in plain.transformer.__dict__)


@pytest.mark.parametrize("vectors", [True, False], ids=["with vectors", "encoder alone"])
def test_one_file_generates_the_same_image(name, plain, tmp_path, vectors):
    if vectors:
        config = EtherConfig(method="ether_plus", init_weights=False, target_modules=["to_q"])
        plain.transformer.add_adapter(config, "edges")
    plain.add_control("edges", latent_encoder(plain, value_range=(0.0, 4095.0), interpolation="lanczos"))
    wanted = generate(plain, control_image=IMAGE)
    plain.save_ether_weights(tmp_path, "edges")
    loaded = make_control(name, tmp_path / "again") if (tmp_path / "again").mkdir() is None else None
    stock = generate(loaded)
    loaded.load_ether_weights(tmp_path)
    assert np.array_equal(generate(loaded, control_image=IMAGE), wanted)
    config = loaded.controls["default_0"].encoder.config
    assert (config.interpolation, list(config.value_range)) == ("lanczos", [0, 4095])
    loaded.disable_ether()
    assert np.array_equal(generate(loaded, control_image=IMAGE), stock)
    loaded.enable_ether()
    loaded.unload_ether_weights()
    assert np.array_equal(generate(loaded), stock)
