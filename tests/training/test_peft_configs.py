"""Any PEFT config in place of a method: trained, saved, loaded the stock way; or refused in a sentence."""

import json

import numpy as np
import pytest
from helpers.methods import options_of, perturb, reopen, start
from helpers.pipelines import ONE_GREY_LEVEL, generate
from peft import HRAConfig, LoraConfig, OFTConfig, VeraConfig

from ether_diffusion import EtherConfig
from ether_diffusion.errors import InputError
from ether_diffusion.training.families import StableDiffusion
from ether_diffusion.training.methods.configs import configs_of, read_method
from ether_diffusion.training.methods.injection import dry_run, trained_parameters
from ether_diffusion.training.methods.saving import save_trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def config_file(tmp_path):
    """Writes an --adapter_config and returns its path."""

    def write(content) -> str:
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


CONFIGS = {
    "ether": {"peft_type": "ETHER", "num_blocks": 2},
    "ether_plus": {"peft_type": "ETHER", "method": "ether_plus"},
    "lora": {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "lora_bias": True,
        "rank_pattern": {r"attn1\.to_q": 3},
        "inference_mode": True,
        "target_modules": ["to_q", "to_v", "conv1"],
    },
    "loha": {"peft_type": "LOHA", "r": 2, "alpha": 2, "target_modules": ["to_q", "to_k"], "revision": None},
    "hra": {"peft_type": "HRA", "r": 2, "bias": "hra_only", "modules_to_save": ["conv_out"], "task_type": "CAUSAL_LM"},
    "oft": {"peft_type": "OFT", "oft_block_size": 4, "target_modules": r".*attn\d\.to_[qv]"},
    "vera": {"peft_type": "VERA", "r": 8, "save_projection": False},
    "ln_tuning": {"peft_type": "LN_TUNING", "target_modules": ["norm1", "norm2"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_peft_config_trains_and_loads(
    name, config_file, tiny_pipeline, tiny_pipeline_folder, blueprint, base_image, tmp_path
):
    more = {"text_encoder_target_modules": ("layer_norm1",)} if name == "ln_tuning" else {}
    options = options_of(None, True, adapter_config=config_file(CONFIGS[name]), **more)
    method, configs, models = start(tiny_pipeline, options)
    assert method.name == name
    assert dry_run(blueprint.models, configs) == sum(p.numel() for p in trained_parameters(models, configs)) > 0
    perturb(models, configs, size=0.3)
    tuned = generate(tiny_pipeline)
    assert np.abs(tuned - base_image).max() > 2 * ONE_GREY_LEVEL
    save_trained(tiny_pipeline, configs, tmp_path / "result", method=method, metadata={})
    loaded = generate(reopen(tiny_pipeline_folder, tmp_path / "result", method, list(configs)))
    assert np.abs(loaded - tuned).max() <= ONE_GREY_LEVEL


def test_dora_on_the_denoiser_loads_the_stock_way(config_file, tiny_pipeline, tiny_pipeline_folder, tmp_path):
    options = options_of(adapter_config=config_file({"peft_type": "LORA", "r": 2, "use_dora": True}))
    method, configs, models = start(tiny_pipeline, options)
    perturb(models, configs, size=0.3)
    save_trained(tiny_pipeline, configs, tmp_path / "result", method=method, metadata={})
    loaded = generate(reopen(tiny_pipeline_folder, tmp_path / "result", method, list(configs)))
    assert np.abs(loaded - generate(tiny_pipeline)).max() <= ONE_GREY_LEVEL


def test_dora_on_text_encoders_is_refused(config_file):
    options = options_of(None, True, adapter_config=config_file({"peft_type": "LORA", "use_dora": True}))
    with pytest.raises(InputError, match="--train_text_encoder: .*use_dora"):
        configs_of(read_method(options), StableDiffusion, options)


@pytest.mark.parametrize("config", [LoraConfig(r=3), HRAConfig(r=3), OFTConfig(), VeraConfig(), EtherConfig()])
def test_what_peft_saved_is_read_as_a_config(config, tmp_path):
    config.save_pretrained(tmp_path)
    options = options_of(adapter_config=str(tmp_path / "adapter_config.json"))
    read = configs_of(read_method(options), StableDiffusion, options)["unet"]
    assert type(read) is type(config)
    assert read.to_dict() | {"target_modules": None} == config.to_dict() | {"target_modules": None}


def test_targets_of_the_command_line_take_the_place_of_the_config_s(config_file):
    options = options_of(adapter_config=config_file(CONFIGS["loha"]), target_modules=("to_v",))
    configs = configs_of(read_method(options), StableDiffusion, options)
    assert configs["unet"].target_modules == {"to_v"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json: is not JSON"),
        ("[1]", "holds a JSON list, needs an object"),
        ({"r": 4}, "has no peft_type; needs one of ADALORA, .*LORA"),
        ({"peft_type": "LURA"}, "peft_type 'LURA' is unknown; needs one of"),
        ({"peft_type": ["LORA"]}, r"peft_type \['LORA'\] is unknown"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING learns prompts and injects no layers; needs one of"),
        ({"peft_type": "VBLORA"}, "VBLORA trains vectors that lie outside of the layers"),
        ({"peft_type": "XLORA"}, "XLORA mixes adapters"),
        ({"peft_type": "LORA", "rnak": 4}, "LoraConfig has no rnak; it has .*lora_alpha"),
        ({"peft_type": "LORA", "r": "four"}, "got r='four', needs int"),
        ({"peft_type": "HRA", "apply_GS": 1}, "got apply_GS=1, needs bool"),
        ({"peft_type": "OFT", "r": 4, "oft_block_size": 4}, "only specify either r"),
        ({"peft_type": "ETHER", "method": "ether_minus"}, "method='ether_minus'"),
        ({"peft_type": "ETHER", "bias": "all"}, "bias='all' trains weights of the model itself"),
        ({"peft_type": "ETHER", "modules_to_save": ["conv_in"]}, r"modules_to_save=\['conv_in'\] trains weights"),
        ({"peft_type": "LORA", "bias": "lora_only"}, "a file of LoRA weights does not hold"),
        ({"peft_type": "LORA", "layer_replication": [[0, 1]]}, r"layer_replication=\[\[0, 1\]\] is nothing that"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "'pissa' changes the weights of the model"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(content, message, config_file):
    with pytest.raises(InputError, match=message) as caught:
        read_method(options_of(adapter_config=config_file(content)))
    assert str(caught.value).startswith("--adapter_config ")


def test_a_config_that_is_not_there_says_so(tmp_path):
    with pytest.raises(InputError, match="--adapter_config .*absent.json: cannot be read .*No such file"):
        read_method(options_of(adapter_config=str(tmp_path / "absent.json")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"peft_type": "LORA", "target_modules": ["to_q", "to_query"]},
            "unet: no layer is called 'to_query'; layers to adapt are .*to_out.0, to_q",
        ),
        ({"peft_type": "LORA", "target_modules": "nothing"}, "unet: .*nothing"),
        ({"peft_type": "LORA", "r": 0}, "unet: .*r.*positive"),
        ({"peft_type": "OFT", "oft_block_size": 7}, "oft_block_size=7 does not divide 16; try 1, 2, 4, 8, 16"),
        ({"peft_type": "BOFT", "boft_block_size": 3}, "boft_block_size=3 does not divide 16; try"),
        ({"peft_type": "BOFT", "boft_n_butterfly_factor": 2}, "boft_n_butterfly_factor=2 needs a kernel"),
        ({"peft_type": "VERA", "target_modules": ["conv_in"]}, "unet: "),
        ({"peft_type": "ETHER", "num_blocks": 3}, "num_blocks=3 does not divide"),
    ],
)
def test_a_config_that_does_not_fit_the_model_fails_in_the_dry_run(values, message, config_file, blueprint):
    options = options_of(adapter_config=config_file(values))
    configs = configs_of(read_method(options), StableDiffusion, options)
    with pytest.raises(InputError, match=message):
        dry_run(blueprint.models, configs)
