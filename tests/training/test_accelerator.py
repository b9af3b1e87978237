"""Devices and precision: what the flags say holds, whatever Accelerate finds in its surroundings."""

import logging

import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.scripts import DREAMBOOTH, launch, refusal, same

from ether_diffusion.training.accelerator import make_accelerator
from ether_diffusion.training.options import OptimizationOptions, PerformanceOptions, RunOptions

OVERRULED = {
    "accumulation": ("GRADIENT_ACCUMULATION_STEPS", "4", "", "--gradient_accumulation_steps, which is 1"),
    "accumulation given": ("GRADIENT_ACCUMULATION_STEPS", "4", "--gradient_accumulation_steps 2", "which is 2"),
    "accumulation that is no number": ("GRADIENT_ACCUMULATION_STEPS", "many", "", "--gradient_accumulation_steps"),
    "clipping": ("GRADIENT_CLIPPING", "0.001", "", "--max_grad_norm, which is 1.0"),
    "precision given": ("MIXED_PRECISION", "bf16", "--mixed_precision no", "--mixed_precision, which is no"),
    "compiler": ("DYNAMO_BACKEND", "aot_eager", "", "--compile, which is False"),
}


@pytest.mark.parametrize("kind", OVERRULED)
def test_the_surroundings_change_no_training_and_a_conflict_is_one_sentence(train, monkeypatch, caplog, kind):
    variable, value, flags, words = OVERRULED[kind]
    caplog.set_level(logging.INFO)
    flags = [*flags.split(), "--max_train_steps", 4]
    plain, folder = train(*flags, output="plain")
    assert "Accelerate's configuration" not in caplog.text
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    changed, other = train(*flags, output="changed")
    assert same(folder, other) and changed.losses == plain.losses and len(plain.losses) == 4
    (line,) = [each.getMessage() for each in caplog.records if "Accelerate's configuration" in each.getMessage()]
    assert "overruled by --" in line and words in line and value in line


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "1"),
        ("GRADIENT_ACCUMULATION_STEPS", "auto"),
        ("GRADIENT_CLIPPING", "1"),
        ("MIXED_PRECISION", "no"),
        ("DYNAMO_BACKEND", "no"),
        ("DYNAMO_BACKEND", "NO"),
    ],
)
def test_where_the_surroundings_agree_nothing_is_said(monkeypatch, caplog, variable, value):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    make_accelerator(RunOptions(), PerformanceOptions(), OptimizationOptions())
    assert not caplog.text


@pytest.mark.parametrize("name", ["FULLGRAPH", "DYNAMIC", "REGIONAL_COMPILATION"])
def test_a_setting_of_the_compiler_is_not_even_read(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_DYNAMO_USE_{name}", "perhaps")
    with pytest.raises(ValueError, match="perhaps"):
        Accelerator(cpu=True)
    make_accelerator(RunOptions(), PerformanceOptions(), OptimizationOptions())


def test_without_a_flag_the_precision_is_the_launchers(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_accelerator(RunOptions(), PerformanceOptions(), OptimizationOptions()).mixed_precision == "bf16"


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"])
def test_what_would_divide_the_training_otherwise_is_refused(train, monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "true")
    assert "comes from Accelerate's configuration" in refusal(capsys, train)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_on_a_cpu_is_called_slow(caplog):
    caplog.set_level(logging.INFO)
    make_accelerator(RunOptions(), PerformanceOptions(mixed_precision="fp16"), OptimizationOptions())
    assert "about ten times slower on a CPU" in caplog.text


@pytest.mark.slow
def test_a_configuration_file_of_the_launcher_changes_no_training(train, photographs, tiny_pipeline_folder, tmp_path):
    _, plain = train(output="plain")
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": True, "num_processes": 1}
    config |= {"mixed_precision": "no", "dynamo_config": {"dynamo_backend": "AOT_EAGER"}}
    config |= {"machine_rank": 0, "num_machines": 1, "main_training_function": "main", "debug": False}
    home = tmp_path / "home" / "accelerate"
    home.mkdir(parents=True)
    (home / "default_config.yaml").write_text(yaml.safe_dump(config))
    flags = ["--pretrained_model_name_or_path", tiny_pipeline_folder, "--instance_data_dir", photographs]
    flags += ["--instance_prompt", "a photo of sks toy", "--max_train_steps", 3, "--num_validation_images", 0]
    flags += ["--learning_rate", 0.05, "--output_dir", tmp_path / "launched"]
    done = launch(DREAMBOOTH, *flags, HF_HOME=str(tmp_path / "home"), ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert done.returncode == 0, done.stderr
    assert "dynamo_backend aot_eager" in done.stderr and "gradient_accumulation_steps 4" in done.stderr
    assert same(plain, tmp_path / "launched")
