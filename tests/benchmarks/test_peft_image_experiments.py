"""The experiments of PEFT's image benchmark: PEFT's own loader reads them, and they have the published sizes."""

import json
from pathlib import Path

import pytest
import torch
from helpers.flow_parts import flux2_transformer
from peft import PeftConfig, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft_image_gen.settings import EXPERIMENTS, PROMPTS, read_experiment
from workloads import flux2_inputs, flux2_klein

import ether_diffusion
from ether_diffusion.errors import InputError

BASE = 3_875_544_576
"""Parameters of the transformer of FLUX.2 klein 4B, as PEFT's row of finetuning all of them has it."""
COUNTS = {
    "ether": 307_200, "ether_plus": 2_396_160, "ether_plus_one_sided": 614_400,
    "lora": 38_338_560, "oft": 4_761_600,
}  # fmt: skip
FOLDERS = sorted(file.parent for file in EXPERIMENTS.rglob(CONFIG_NAME))


def name_of(folder: Path) -> str:
    return folder.parent.name


def test_every_experiment_lies_where_the_runner_of_peft_looks_for_it():
    assert {name_of(folder) for folder in FOLDERS} == set(COUNTS)
    assert {folder.relative_to(EXPERIMENTS.parent).parts[0] for folder in FOLDERS} == {"experiments"}
    assert {len(folder.relative_to(EXPERIMENTS.parent).parts) for folder in FOLDERS} == {3}


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_peft_reads_an_experiment_adapts_flux2_and_saves_the_adapter(folder, tmp_path):
    assert ether_diffusion.EtherConfig  # the import alone makes PEFT know the method
    transformer = flux2_transformer(guidance=False).to(torch.bfloat16)
    small = {"hidden_states": (2, 4, 16), "encoder_hidden_states": (2, 3, 48)}
    inputs = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in small.items()}
    ids = {name: tensor for name, tensor in flux2_inputs(2, 2, 3).items() if name.endswith("_ids")}
    inputs |= {"timestep": torch.rand(2), **ids}
    config = PeftConfig.from_pretrained(str(folder))
    model = get_peft_model(transformer, config, autocast_adapter_dtype=True)
    trained = [each for each in model.parameters() if each.requires_grad]
    assert trained and all(each.dtype == torch.float32 for each in trained)
    model(**inputs).sample.float().square().mean().backward()
    assert all(each.grad is not None for each in trained)
    with torch.no_grad(), model.disable_adapter():
        assert torch.isfinite(model(**inputs).sample).all()
    model.save_pretrained(tmp_path)
    assert (tmp_path / SAFETENSORS_WEIGHTS_NAME).stat().st_size >= 4 * sum(each.numel() for each in trained)
    assert json.dumps({k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()})  # as it logs


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_at_full_size_an_experiment_trains_as_many_parameters_as_arithmetic_says(folder):
    with torch.device("meta"):
        transformer = flux2_klein()
        model = get_peft_model(transformer, PeftConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)
    count = COUNTS[name_of(folder)]
    assert model.get_nb_trainable_parameters() == (count, BASE + count)


def write(folder, parameters=None, **config):
    folder.mkdir(parents=True)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    if parameters is not None:
        (folder / "training_params.json").write_text(json.dumps(parameters))
    return str(folder)


def test_an_experiment_goes_by_its_two_folders_and_has_the_benchmarks_parameters(tmp_path):
    experiment = read_experiment(write(tmp_path / "ia3" / "mine", peft_type="IA3"))
    assert experiment.name == "ia3/mine" and experiment.config.peft_type == "IA3"
    training = experiment.training
    assert (training.max_steps, training.batch_size, training.grad_norm_clip) == (750, 2, 1.0)
    assert training.optimizer_kwargs == {"lr": 1e-4, "weight_decay": 1e-4} and training.optimizer_type == "AdamW"
    assert read_experiment("ether/flux2-klein-default").training.optimizer_kwargs["lr"] == 2e-3


def test_parameters_of_an_experiment_replace_the_defaults_whole_as_in_the_runner_of_peft(tmp_path):
    place = write(tmp_path / "a" / "b", {"optimizer_kwargs": {"lr": 1e-3}, "eval_steps": 50}, peft_type="LORA")
    assert read_experiment(place).training.optimizer_kwargs == {"lr": 1e-3}  # without the weight decay


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"resolution": 1024}, "resolution: Extra inputs are not permitted; an experiment may set max_steps"),
        ({"max_steps": 0}, "max_steps: Input should be greater than 0"),
        ({"optimizer_type": "lora+"}, "torch.optim has no optimizer 'lora\\+'"),
        ({"optimizer_kwargs": {"weight_decay": 0.1}}, "optimizer_kwargs: .*needs an lr above 0"),
        ([1], "is no JSON object"),
    ],
)
def test_parameters_that_are_not_the_experiments_to_set_are_refused(tmp_path, parameters, message):
    with pytest.raises(InputError, match=message):
        read_experiment(write(tmp_path / "a" / "b", parameters, peft_type="LORA"))


def test_folders_without_a_config_that_peft_reads_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such folder; here are ether/flux2-klein-default, ether_plus/"):
        read_experiment("ether/other")
    with pytest.raises(InputError, match="PEFT cannot read it"):
        read_experiment(write(tmp_path / "a" / "b", peft_type="NOTHING"))
    (tmp_path / "full").mkdir()
    with pytest.raises(InputError, match="holds no adapter_config.json; finetuning of all weights is not covered"):
        read_experiment(str(tmp_path / "full"))


def test_there_is_a_prompt_for_each_of_the_twenty_images():
    assert len(set(PROMPTS)) == 20 and sum("sks cat" in prompt for prompt in PROMPTS) == 20
