"""Options: from the command line, from a YAML or JSON file, and checked wherever they come from."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from ether_diffusion.errors import InputError
from ether_diffusion.training import control
from ether_diffusion.training.dreambooth import Options
from ether_diffusion.training.options import OptimizationOptions, OptionParser, flatten, groups_of, parse_options

NEEDED = ["--instance_data_dir", "photos", "--instance_prompt", "a dog"]


def test_flags_become_options_and_defaults_stay():
    options = parse_options(
        Options, [*NEEDED, "--method", "ether", "--target_modules", "to_q", "to_v", "--random_flip"]
    )
    assert options.adapter.method == "ether" and options.adapter.target_modules == ("to_q", "to_v")
    assert options.views.random_flip and not options.views.center_crop
    assert options.optimization == OptimizationOptions()
    flat = flatten(options)
    assert flat["target_modules"] == "to_q, to_v" and flat["resolution"] == "default"
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())


@pytest.mark.parametrize("options", [Options, control.Options])
def test_every_flag_has_a_test(options):
    flags = [each.name for group in groups_of(options).values() for each in fields(group)]
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [flag for flag in flags if f"--{flag}" not in tests] == []


def test_help_names_every_flag():
    text = OptionParser(Options).format_help()
    for name, group in groups_of(Options).items():
        assert group.__doc__ in text, name
        assert all(f"--{each.name}" in text for each in fields(group))


def test_steps_and_learning_rates_become_definite():
    fixed = {"default_learning_rate": 0.25, "epoch_samples": 10, "processes": 2}
    usual = OptimizationOptions().resolve(**fixed)
    assert (usual.steps, usual.learning_rate, usual.text_encoder_lr) == (200, 0.25, None)
    epochs = OptimizationOptions(num_train_epochs=3, train_batch_size=4, gradient_accumulation_steps=2).resolve(
        **fixed
    )
    assert epochs.steps == 2  # 30 images, 16 a step
    scaled = OptimizationOptions(learning_rate=0.5, text_encoder_lr=0.125, train_batch_size=4, scale_lr=True)
    scaled = scaled.resolve(**fixed)
    assert (scaled.learning_rate, scaled.text_encoder_lr) == (4.0, 1.0)
    assert scaled.resolve(**fixed) == scaled
    assert OptimizationOptions(optimizer="prodigy").resolve(**fixed).learning_rate == 1.0
    with pytest.raises(ValueError, match="not resolved"):
        _ = OptimizationOptions(num_train_epochs=3).steps


@pytest.mark.parametrize("options", [Options, control.Options])
def test_the_default_run_keeps_a_checkpoint_before_its_end(options):
    groups = groups_of(options)
    assert groups["state"]().checkpointing_steps < groups["optimization"]().steps


# Flags in a file.

CONFIG = {
    "instance_data_dir": "photos",
    "instance_prompt": "a dog",
    "learning_rate": 1e-3,
    "max_train_steps": 7,
    "target_modules": ["to_q", "to_v"],
    "random_flip": True,
    "center_crop": False,
    "resolution": None,
}


def config(folder: Path, suffix: str, **given) -> str:
    path = folder / f"config{suffix}"
    path.write_text(json.dumps({**CONFIG, **given}) if suffix == ".json" else yaml.safe_dump({**CONFIG, **given}))
    return str(path)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_flags_in_a_file_are_flags_and_those_after_it_go_before_them(tmp_path, suffix):
    path = config(tmp_path, suffix)
    flags = [*NEEDED, "--learning_rate", "1e-3", "--max_train_steps", "7", "--random_flip"]
    flags += ["--target_modules", "to_q", "to_v"]
    assert parse_options(Options, [path]) == parse_options(Options, flags)
    changed = parse_options(Options, [path, "--max_train_steps", "9", "--target_modules", "to_k"])
    assert changed.optimization.max_train_steps == 9 and changed.adapter.target_modules == ("to_k",)


def test_numbers_as_yaml_writers_write_them_are_numbers(tmp_path):
    (tmp_path / "config.yaml").write_text("instance_data_dir: 7\ninstance_prompt: a dog\nlearning_rate: 1e-3\n")
    options = parse_options(Options, [str(tmp_path / "config.yaml")])
    assert options.optimization.learning_rate == 1e-3 and options.data.instance_data_dir == "7"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 1}, "config.yaml: no flag is called 'lr'; --help lists the flags"),
        ({"random_flip": "often"}, "config.yaml: random_flip is 'often', needs true or false"),
        ({"max_train_steps": True}, "config.yaml: max_train_steps is True, needs one number or text"),
        ({"max_train_steps": [1]}, r"config.yaml: max_train_steps is \[1\], needs one number or text"),
        ({"target_modules": "to_q"}, "config.yaml: target_modules is 'to_q', needs a list of texts"),
        ({"max_train_steps": 0}, "--max_train_steps: got 0, needs a whole number from 1"),
        ({"method": "dora"}, "--method: got 'dora', needs one of ether, "),
        ({"adam_beta1": "nan"}, "--adam_beta1: got nan, needs a number from 0 and below 1"),
    ],
)
def test_a_wrong_value_in_a_file_is_explained(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        parse_options(Options, [config(tmp_path, ".yaml", **given)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_train_steps": "many"}, "argument --max_train_steps: invalid int value: 'many'"),
        ({"instance_prompt": None}, "the following arguments are required: --instance_prompt"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_ends_the_program_as_a_flag_does(tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as stop:
        parse_options(Options, [config(tmp_path, ".json", **given)])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.yaml: cannot be read as a config file .*No such file"),
        ("a: [", "config.yaml: cannot be read as a config file .*line 1"),
        ("- random_flip", "config.yaml: holds list, needs names of flags with their values"),
    ],
)
def test_a_file_that_holds_no_flags_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        parse_options(Options, [str(tmp_path / "config.yaml")])
    assert "\n" not in str(error.value)
