"""What an EtherConfig takes, and what it refuses."""

import pytest

from ether_diffusion import EtherConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lora"}, "choose 'ether' or 'ether_plus'"),
        ({"sides": "output"}, "choose 'input' or 'both'"),
        ({"sides": "both"}, "needs method='ether_plus'"),
        ({"num_blocks": 0}, "at least 1"),
        ({"num_blocks": 1.5}, "at least 1"),
        ({"bias": "lora_only"}, "choose 'none', 'all' or 'ether_only'"),
        ({"target_modules": "a.*", "layers_to_transform": [0]}, "not a regular expression"),
        ({"layers_pattern": "layers"}, "only together with layers_to_transform"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EtherConfig(**fields)


def test_the_first_layer_alone_can_be_chosen():
    assert EtherConfig(layers_to_transform=0, layers_pattern="layers").layers_to_transform == 0
