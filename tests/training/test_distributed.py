"""Runs over several processes: the launcher's configurations, layouts that do not fit, and equal results in each."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from diffusers import StableDiffusionPipeline
from helpers.processes import in_processes
from helpers.scripts import DREAMBOOTH, ROOT, STEADY, vectors
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.errors import InputError
from ether_diffusion.training import distributed, dreambooth
from ether_diffusion.training.accelerator import on_main_process
from ether_diffusion.training.checkpoint_files import STATE_NAME
from ether_diffusion.training.distributed import check_layout, claim_layout, gathered, shard_frozen
from ether_diffusion.training.families.stable_diffusion import StableDiffusion
from ether_diffusion.training.methods.configs import configs_of, read_method
from ether_diffusion.training.methods.injection import add_adapters, trained_parameters
from ether_diffusion.training.options import parse_options
from ether_diffusion.tuner.config import EtherConfig

CONFIGS = ROOT / "configs"
PEERS = ("ether", "ether_plus", "lora", "oft", "boft", "hra", "vera")

with_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
on_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


# Configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_launcher_takes_every_configuration(path):
    config = load_config_from_file(str(path))  # unknown keys fail
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config} <= known
    assert {*config.deepspeed_config} <= known
    assert config.mixed_precision == "bf16" and config.num_processes % config.num_machines == 0


def test_there_is_a_configuration_for_every_layout():
    kinds = {path.stem: load_config_from_file(str(path)).distributed_type.value for path in CONFIGS.glob("*.yaml")}
    expected = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED", "multi_node": "MULTI_GPU"}
    assert kinds == expected


def test_a_layout_is_claimed_from_the_launcher_once(monkeypatch):
    assert claim_layout() == "replicated"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert claim_layout() == "sharded"
    assert "ACCELERATE_USE_FSDP" not in os.environ
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert claim_layout() == "partitioned"


@pytest.mark.parametrize(
    "switch, variable, value, message",
    [
        ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "1", "fsdp_version: 1 .* needs 2"),
        ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: true .* needs false"),
        ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "zero_stage: 3 .* needs 2"),
    ],
)
def test_settings_of_the_launcher_that_do_not_fit_are_refused(monkeypatch, switch, variable, value, message):
    monkeypatch.setenv(switch, "true")
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=message):
        claim_layout()


# Layouts that do not fit ----------------------------------------------------------------------------------------


@pytest.fixture
def options(photographs):
    words = ["--instance_data_dir", str(photographs), "--instance_prompt", "a toy"]
    return parse_options(dreambooth.Options, words, "")


def check(layout, options, config, precision="no"):
    check_layout(layout, options, {"unet": config}, denoiser="unet", precision=precision)


def test_full_finetuning_is_sent_from_fsdp_to_zero(options):
    with pytest.raises(InputError, match="--method full: leaves no frozen weights .* configs/deepspeed_zero2.yaml"):
        check("sharded", options, None)


def test_zero_takes_full_finetuning_where_deepspeed_is_installed(options):
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(InputError, match="pip install deepspeed"):
            check("partitioned", options, None, "bf16")
    else:
        check("partitioned", options, None, "bf16")


def test_adapters_are_sent_from_zero_to_ddp_and_fsdp(options):
    with pytest.raises(InputError, match="needs full, or launch with configs/ddp.yaml or configs/fsdp.yaml"):
        check("partitioned", options, EtherConfig())
    check("sharded", options, EtherConfig())


def test_what_reads_whole_weights_is_refused_over_shards(options):
    with pytest.raises(InputError, match="use_dora reads entire weights"):
        check("sharded", options, LoraConfig(use_dora=True))
    compiled = replace(options, performance=replace(options.performance, compile=True))
    with pytest.raises(InputError, match="--compile"):
        check("sharded", compiled, EtherConfig())


def test_zero_takes_adamw_and_no_16_bit_weights_alone(options):
    with pytest.raises(InputError, match="--mixed_precision fp16: .* needs bf16 or no"):
        check("partitioned", options, None, "fp16")
    prodigy = replace(options, optimization=replace(options.optimization, optimizer="prodigy"))
    with pytest.raises(InputError, match="--optimizer prodigy: .* only --optimizer adamw fits"):
        check("partitioned", prodigy, None)


def test_one_process_answers_for_itself():
    accelerator = Accelerator(cpu=True)
    assert on_main_process(accelerator, lambda: "name") == "name"
    with pytest.raises(InputError, match="not so"):
        on_main_process(accelerator, lambda: (_ for _ in ()).throw(InputError("not so")))


# Two processes in this one's image ------------------------------------------------------------------------------


def _raise_together(accelerator):
    with pytest.raises(InputError, match="no such user"):
        on_main_process(accelerator, lambda: (_ for _ in ()).throw(InputError("no such user")))
    assert on_main_process(accelerator, lambda: accelerator.process_index) == 0


def test_an_error_on_the_main_process_is_raised_on_all():
    in_processes(2, _raise_together)


def adapted(folder: Path, config, dtype=torch.float32, accelerator=None):
    unet = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype).unet.requires_grad_(False)
    if accelerator is not None:
        shard_frozen(unet, accelerator)
        unet.to("cpu")  # what a pipeline does; nothing changes
    add_adapters({"unet": unet}, {"unet": copy.deepcopy(config)}, seed=0)
    return unet


def gradients(unet, *, half=False):
    """Of two passes, the first without gradients; with activation checkpointing."""
    draw = torch.Generator().manual_seed(1)
    noisy, text = (torch.randn(size, generator=draw) for size in ((2, 4, 8, 8), (2, 16, 16)))
    unet.train().enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        with torch.no_grad():
            unet(noisy, torch.tensor([3, 900]), text)
        answer = unet(noisy, torch.tensor([3, 900]), text).sample
    answer.float().square().mean().backward()
    trained = trained_parameters({"unet": unet}, {"unet": None})
    assert not any(isinstance(each, DTensor) for each in trained)
    return [answer.detach(), *(each.grad for each in trained if each.grad is not None)]


def _compare_shards(accelerator, folder, configs):
    for half in (False, True):
        dtype = torch.bfloat16 if half else torch.float32
        for config in configs if not half else configs[:2]:
            whole, sharded = (adapted(folder, config, dtype, each) for each in (None, accelerator))
            local = sum(each.to_local().numel() for each in sharded.parameters() if isinstance(each, DTensor))
            assert local < 0.6 * sum(each.numel() for each in whole.parameters())
            tolerance = {"rtol": 0.02, "atol": 1e-4} if half else {"rtol": 1e-4, "atol": 1e-6}
            with gathered(sharded, accelerator):
                if accelerator.is_main_process:
                    ours, theirs = sharded.state_dict(), whole.state_dict()
                    assert ours.keys() == theirs.keys()
                    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
            assert any(isinstance(each, DTensor) for each in sharded.parameters())
            for ours, theirs in zip(gradients(sharded, half=half), gradients(whole, half=half), strict=True):
                torch.testing.assert_close(ours, theirs, **tolerance)


def _configs(options):
    given = [replace(options.adapter, method=name) for name in PEERS]
    return [configs_of(read_method(each), StableDiffusion, each)["unet"] for each in given]


def test_every_method_has_the_gradients_of_the_whole_model_over_a_sharded_one(tiny_pipeline_folder, options):
    in_processes(2, _compare_shards, tiny_pipeline_folder, _configs(options))


def _operate_on_plain_weights(accelerator, folder):
    from ether_diffusion.tuner import layer as layers

    seen, asked = set(), layers.computes_as_written

    def notice(base, x):
        seen.add((type(base.weight), asked(base, x)))
        return asked(base, x)

    layers.computes_as_written = notice
    gradients(adapted(folder, EtherConfig(target_modules=["to_q"], num_blocks=2), accelerator=accelerator))
    assert seen == {(torch.nn.Parameter, True)}


def test_inside_a_sharded_block_the_operators_find_plain_weights(tiny_pipeline_folder):
    in_processes(2, _operate_on_plain_weights, tiny_pipeline_folder)


def _keep_to_the_machine(accelerator):
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # two machines with a process each
    assert distributed._mesh_of_machine(accelerator).size() == 1


def test_weights_are_sharded_over_the_processes_of_one_machine():
    in_processes(2, _keep_to_the_machine)


# Whole runs -----------------------------------------------------------------------------------------------------


def run(config: str, processes: int, folder: Path, photographs: Path, *flags: object, cpu: bool = True) -> str:
    """Launch the DreamBooth script with one of the configurations; what it said."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
    command += [str(DREAMBOOTH), "--instance_data_dir", str(photographs), "--instance_prompt", "a photo of sks toy"]
    command += ["--max_train_steps", "4", "--output_dir", str(folder), *map(str, flags)]
    if "--num_validation_images" not in flags:
        command += ["--num_validation_images", "0"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    if cpu:
        variables |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stderr


def fingerprint(folder: Path) -> dict[str, dict[str, str]]:
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        return json.loads(file.metadata()["ether"])["base_fingerprint"]


SHARDED = (*STEADY, "--learning_rate", 0.05, "--use_ema", "--gradient_accumulation_steps", 2, "--train_text_encoder")


def compare_sharded(tiny_pipeline_folder, photographs, folder, *, cpu):
    flags = ("--pretrained_model_name_or_path", tiny_pipeline_folder, *SHARDED)
    generating = ("--num_validation_images", 1, "--validation_steps", 2, "--num_inference_steps", 2)
    run("ddp", 1, folder / "1", photographs, *flags, *generating, "--train_batch_size", 2, cpu=cpu)
    sharded = ("--train_batch_size", 1, "--checkpointing_steps", 2)
    run("fsdp", 2, folder / "2", photographs, *flags, *generating, *sharded, cpu=cpu)
    torch.testing.assert_close(vectors(folder / "2"), vectors(folder / "1"), rtol=1e-3, atol=1e-3)
    assert fingerprint(folder / "2") == fingerprint(folder / "1")
    for name in ("grid.png", "validation/step-000002.png", "README.md"):
        assert (folder / "2" / name).exists(), name
    return flags, sharded


@pytest.mark.slow
def test_two_processes_with_a_sharded_denoiser_learn_what_one_learns(tiny_pipeline_folder, photographs, tmp_path):
    flags, sharded = compare_sharded(tiny_pipeline_folder, photographs, tmp_path, cpu=True)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (tmp_path / "2" / "checkpoint-2").rename(stopped / "checkpoint-2")
    run("fsdp", 2, stopped, photographs, *flags, *sharded, "--resume_from_checkpoint", "latest")
    assert torch.equal(vectors(stopped), vectors(tmp_path / "2"))


def whole_weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())])


FULL = ("--method", "full", "--learning_rate", 1e-4, "--use_ema", "--gradient_accumulation_steps", 2)


def compare_partitioned(tiny_pipeline_folder, photographs, folder, *, cpu):
    flags = ("--pretrained_model_name_or_path", tiny_pipeline_folder, *FULL)
    parts = ("--train_batch_size", 1, "--checkpointing_steps", 2)
    run("ddp", 1, folder / "1", photographs, *flags, "--train_batch_size", 2, cpu=cpu)
    run("deepspeed_zero2", 2, folder / "2", photographs, *flags, *parts, cpu=cpu)
    one, two = whole_weights(folder / "1"), whole_weights(folder / "2")
    # Adam's first steps have the learning rate's size, whichever sign rounding leaves to a gradient of almost zero.
    assert (one - two).abs().mean() < 1e-6
    torch.testing.assert_close(two, one, rtol=0, atol=5e-4)
    return flags, parts


@pytest.mark.slow
@with_deepspeed
def test_two_processes_with_a_divided_optimizer_learn_what_one_learns(tiny_pipeline_folder, photographs, tmp_path):
    flags, parts = compare_partitioned(tiny_pipeline_folder, photographs, tmp_path, cpu=True)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (tmp_path / "2" / "checkpoint-2").rename(stopped / "checkpoint-2")
    state = torch.load(stopped / "checkpoint-2" / STATE_NAME, weights_only=True)
    assert len(state["optimizer"]) == 2
    run("deepspeed_zero2", 2, stopped, photographs, *flags, *parts, "--resume_from_checkpoint", "latest")
    assert torch.equal(whole_weights(stopped), whole_weights(tmp_path / "2"))


@pytest.mark.slow
@on_gpus
def test_two_gpus_with_a_sharded_denoiser_learn_what_one_learns(tiny_pipeline_folder, photographs, tmp_path):
    compare_sharded(tiny_pipeline_folder, photographs, tmp_path, cpu=False)


@pytest.mark.slow
@on_gpus
@with_deepspeed
def test_two_gpus_with_a_divided_optimizer_learn_what_one_learns(tiny_pipeline_folder, photographs, tmp_path):
    compare_partitioned(tiny_pipeline_folder, photographs, tmp_path, cpu=False)
