"""Files with an encoder of latents: what they say is checked before it is believed."""

import json

import pytest
import torch
from helpers.control import content
from helpers.flow_control import latent_encoder, make_control
from safetensors.torch import load_file, save_file

from ether_diffusion import EtherFileError
from ether_diffusion.adapters.reading import read_adapter_file
from ether_diffusion.adapters.schema import digest


@pytest.fixture
def saved(tmp_path):
    pipe = make_control("flux", tmp_path)
    pipe.add_control("edges", latent_encoder(pipe))
    return pipe.save_ether_weights(tmp_path, "edges")


def lie(path, change) -> None:
    """Sign the file again after a change of what it says."""
    document, tensors = content(path)[0], load_file(path)
    change(document["weights"]["control_encoder"], tensors)
    text = json.dumps(document)
    save_file(tensors, path, {"format": "pt", "ether": text, "sha256": digest(tensors, text)})


def test_the_document_says_what_kind_of_encoder_it_is(saved):
    document, _ = content(saved)
    assert document["format_version"] == 2
    assert document["weights"]["control_encoder"] == {
        "kind": "latent",
        "config": {
            "out_channels": 32,
            "in_channels": 4,
            "patch_size": 2,
            "channels_last": False,
            "interpolation": "nearest",
        },
    }
    assert list(load_file(saved)) == ["control_encoder.projection.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about, t: about.update(kind="other"), "kind: got 'other', needs conv or latent"),
        (lambda about, t: about.update(kind=[]), "kind: got .., needs conv or latent"),
        (lambda about, t: about.pop("kind"), "is missing|nothing that this release knows"),
        (lambda about, t: about["config"].update(out_channels=33), r"has shape \(32, 16\), but the config needs \(33"),
        (lambda about, t: about["config"].update(patch_size=1 << 20), "patch_size: got .* less than or equal to 16"),
        (lambda about, t: about["config"].update(channels_last=1), "channels_last: got 1: needs a valid boolean"),
        (lambda about, t: about["config"].update(in_channels=True), "in_channels: got True: needs a valid integer"),
        (lambda about, t: about["config"].pop("in_channels"), "in_channels is missing"),
        (lambda about, t: t.update({"control_encoder.bias": torch.ones(1)}), "bias is no weight of a control encoder"),
        (lambda about, t: t["control_encoder.projection.weight"].fill_(torch.nan), "is not made of finite numbers"),
    ],
)
def test_what_does_not_fit_is_refused(saved, change, message):
    lie(saved, change)
    with pytest.raises(EtherFileError, match=message):
        read_adapter_file(saved)
