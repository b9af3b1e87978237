"""A command line that was written for another script, or from memory: taken, or told what is meant."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.scripts import refusal, same

from ether_diffusion.errors import InputError
from ether_diffusion.training import control, dreambooth
from ether_diffusion.training.options import RunOptions, flatten, groups_of, parse_options

NEEDED = {
    dreambooth.Options: ["--instance_data_dir", "photos", "--instance_prompt", "a dog"],
    control.Options: ["--train_data_dir", "maps"],
}
MEANT = {
    "--learning-rate 1e-3": "learning_rate",
    "--learning-rate=1e-3": "learning_rate",
    "--Learning_Rate 1": "learning_rate",
    "-learning_rate 1": "learning_rate",
    "--learing_rate 1": "learning_rate",
    "--lr 1e-4": "learning_rate",
    "--unet_lr 1e-4": "learning_rate",
    "--min_snr_gamma 5": "snr_gamma",
    "--xformers": "enable_xformers_memory_efficient_attention",
    "--enable_xformers": "enable_xformers_memory_efficient_attention",
    "--max_train_step 5": "max_train_steps",
    "--max-train-steps 5": "max_train_steps",
    "--network_dim 4": "rank",
    "--outputdir x": "output_dir",
    "--mixed-precision fp16": "mixed_precision",
    "--gradient-checkpointing": "gradient_checkpointing",
    "--checkpointing_step 5": "checkpointing_steps",
    "--vae x": "pretrained_vae_model_name_or_path",
}


@pytest.mark.parametrize("options", NEEDED)
@pytest.mark.parametrize("words", MEANT)
def test_a_flag_of_another_name_is_told_which_is_meant(capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        parse_options(options, [*NEEDED[options], *words.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line == f"error: unrecognized arguments: {words} (did you mean --{MEANT[words]}?); --help lists the flags"


def test_what_is_like_no_flag_suggests_none_and_a_misspelled_flag_that_is_needed_is_told_as_such(capsys):
    for words, told in {
        "--qwertz": "unrecognized arguments: --qwertz; --help lists the flags",
        "--instance-prompt toy": "(did you mean --instance_prompt?)",
        "--train_data_dir photos": "(did you mean --instance_data_dir?)",
    }.items():
        with pytest.raises(SystemExit):
            parse_options(dreambooth.Options, words.split())
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("key", ["learning-rate", "lr", "LEARNING_RATE"])
def test_a_key_of_another_name_in_a_file_is_told_which_is_meant(tmp_path, key):
    (tmp_path / "flags.yaml").write_text(f"{key}: 1e-3\n")
    with pytest.raises(InputError, match=re.escape(f"no flag is called '{key}'; ") + ".*did you mean learning_rate"):
        parse_options(dreambooth.Options, [str(tmp_path / "flags.yaml")])


def test_a_value_may_look_like_much(tmp_path):
    values = ["-1", "a --learning-rate of my own", "–dash", "- item"]
    for value in values:
        options = parse_options(dreambooth.Options, ["--instance_data_dir", "x", "--instance_prompt", value])
        assert options.data.instance_prompt == value


@pytest.mark.parametrize("words", ["--validation_epochs=--", "--learning_rate=--", "--target_modules=--"])
def test_a_value_that_argparse_drops_is_missed(capsys, words):
    with pytest.raises(SystemExit) as stop:
        parse_options(dreambooth.Options, [*NEEDED[dreambooth.Options], words])
    assert stop.value.code == 2 and "expected a value" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--instance_prompt", "--validation_prompt", "--class_prompt"])
def test_a_prompt_that_is_no_text_is_one_sentence(train, capsys, tmp_path, flag):
    words = MORE["class_data_dir"] + ["--class_data_dir", tmp_path] if flag == "--class_prompt" else []
    assert f"{flag}: got " in refusal(capsys, train, *words, flag, "a toy\udcff")


TAKEN = ["--set_grads_to_none", "--dataloader_num_workers 4", "--local_rank 0", "--local-rank=0", "--local_rank=-1"]


@pytest.mark.parametrize("words", TAKEN)
@pytest.mark.parametrize("options", NEEDED)
def test_flags_that_commands_carry_and_nothing_depends_on_are_taken(options, words, tmp_path):
    assert parse_options(options, [*NEEDED[options], *words.split()]) == parse_options(options, NEEDED[options])
    (tmp_path / "flags.yaml").write_text("dataloader_num_workers: 4\nset_grads_to_none: true\n")
    assert parse_options(options, [str(tmp_path / "flags.yaml"), *NEEDED[options]])


def test_a_run_with_them_is_the_run_without_them(train):
    words = " ".join(TAKEN[:3]).split()
    assert same(train(*words, output="copied")[1], train(output="plain")[1])


# Paths ----------------------------------------------------------------------------------------------------------

PATHS = {
    "--pretrained_model_name_or_path", "--config_name_or_path", "--pretrained_vae_model_name_or_path",
    "--instance_data_dir", "--reference_dir",
    "--class_data_dir", "--output_dir", "--logging_dir", "--resume_from_checkpoint", "--adapter_config",
    "--dataset_name", "--train_data_dir", "--controlnet_model_name_or_path", "--validation_image",
}  # fmt: skip
MORE = {
    "config_name_or_path": ["--pretrained_model_name_or_path", "x.safetensors"],
    "class_data_dir": ["--with_prior_preservation", "--class_prompt", "toys"],
    "controlnet_model_name_or_path": ["--control_type", "controlnet"],
    "validation_image": ["--validation_prompt", "a house"],
}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (options, each.name)
        for options in NEEDED
        for group in groups_of(options).values()
        for each in fields(group)
        if f"--{each.name}" in PATHS
    ],
)
@pytest.mark.parametrize("given", ["flag", "file"])
def test_the_users_home_is_expanded_in_every_path(monkeypatch, tmp_path, options, name, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    needed = dict(zip(NEEDED[options][::2], NEEDED[options][1::2], strict=True))
    if name == "dataset_name":
        needed = {flag: value for flag, value in needed.items() if not flag.endswith("_data_dir")}
    needed.pop(f"--{name}", None)
    words = [word for pair in needed.items() for word in pair] + MORE.get(name, [])
    if given == "flag":
        parsed = parse_options(options, [*words, f"--{name}=~/models/a b"])
    else:
        value = "['~/models/a b']" if name == "validation_image" else "~/models/a b"
        (tmp_path / "flags.yaml").write_text(f"{name}: {value}\n")
        parsed = parse_options(options, ["~/flags.yaml", *words])
    assert flatten(parsed)[name] == str(tmp_path / "models" / "a b")


@pytest.mark.parametrize("options", NEEDED)
def test_no_flag_that_may_name_a_path_is_left_out(options):
    looks = re.compile(r"(_dir|_path|_image|^adapter_config|^dataset_name|^resume_from_checkpoint)$")
    names = {f"--{each.name}" for group in groups_of(options).values() for each in fields(group)}
    assert {name for name in names if looks.search(name)} - {"--overwrite_output_dir"} <= PATHS


def test_a_run_finds_everything_in_the_users_home(train, monkeypatch, tmp_path, photographs, tiny_pipeline_folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photographs)
    (tmp_path / "base").symlink_to(tiny_pipeline_folder)
    flags = ["--instance_data_dir", "~/photos", "--pretrained_model_name_or_path", "~/base", "--output_dir", "~/out"]
    assert same(train(*flags)[1], train(output="usual")[1]) and not Path("~").exists()


# Trackers -------------------------------------------------------------------------------------------------------


def test_a_run_reports_to_several_trackers(train, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    try:
        _, folder = train("--report_to", "tensorboard", "wandb", "--max_train_steps", 1)
    finally:
        wandb.teardown()
    assert list((folder / "logs" / "ether-diffusion").rglob("events.*"))
    assert list((folder / "logs" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("given", ["tensorboard", ("tensorboard",)])
def test_one_tracker_may_be_a_text(tmp_path, given):
    assert RunOptions(report_to=given) == RunOptions(report_to=("tensorboard",))
    (tmp_path / "flags.yaml").write_text("report_to: tensorboard\n")
    parsed = parse_options(dreambooth.Options, [str(tmp_path / "flags.yaml"), *NEEDED[dreambooth.Options]])
    assert parsed.run.report_to == ("tensorboard",)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("tensorboard comet", "invalid choice: 'comet'"),
        ("none tensorboard", "--report_to none tensorboard: none contradicts the others; drop one"),
    ],
)
def test_trackers_that_do_not_go_together_are_one_sentence(train, capsys, words, told):
    assert told in refusal(capsys, train, "--report_to", *words.split())
