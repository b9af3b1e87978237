"""--variant and --revision: which files of a base a command loads, for every command that loads one."""

import shutil
from pathlib import Path

import pytest
from helpers.control import make_encoder
from helpers.pipelines import adapt, open_pipeline
from huggingface_hub import constants

from ether_diffusion import EtherControlPipeline
from ether_diffusion.commands import main as cli
from ether_diffusion.demo.library import Library
from ether_diffusion.demo.worker import Worker
from ether_diffusion.miniature.control_data import write_control_data

COMMIT = "0123456789012345678901234567890123456789"
QUICK = ["--num_inference_steps", "1", "--evaluator", "edges", "--fid_features", "none"]
COMMANDS = {
    "inspect": ["inspect", "adapter", "--base"],
    "analyze": ["analyze", "adapter", "--base"],
    "export": ["export", "--to", "kohya", "--output_dir", "out", "--adapter", "adapter", "--base"],
    "merge": ["merge", "--output_dir", "out", "--adapter", "adapter", "--base"],
    "evaluate-control": ["evaluate-control", "--output_dir", "out", "--adapter", "control", "--data_dir", "data"]
    + [*QUICK, "--base"],
}


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_pipeline_folder) -> Path:
    """An adapter, one with control, and images with their maps."""
    folder = tmp_path_factory.mktemp("given")
    pipe = adapt(open_pipeline(tiny_pipeline_folder))
    pipe.save_ether_weights(folder / "adapter")
    pipe.unload_ether_weights()
    controlled = EtherControlPipeline.from_pipe(pipe)
    controlled.add_control("default", make_encoder(pipe))
    controlled.save_ether_weights(folder / "control")
    write_control_data(folder / "data", 2, "t", "circles")
    return folder


@pytest.fixture(params=["variant", "revision"])
def base(request, tmp_path, monkeypatch, tiny_pipeline_folder) -> tuple[str, str, str]:
    """A base that opens by this flag alone: its name, the flag and the flag's value."""
    if request.param == "variant":
        open_pipeline(tiny_pipeline_folder).save_pretrained(tmp_path / "base", variant="fp16")
        return str(tmp_path / "base"), "variant", "fp16"
    repository = tmp_path / "hub" / "models--someone--base"
    shutil.copytree(tiny_pipeline_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "tuned").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "someone/base", "revision", "tuned"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_loads_the_version_that_it_is_told_to(command, base, given, tmp_path, monkeypatch, capsys):
    name, flag, value = base
    monkeypatch.chdir(tmp_path)
    words = [str(given / word) if (given / word).exists() else word for word in COMMANDS[command]]
    assert cli.main([*words, name, f"--{flag}", value]) == 0, capsys.readouterr().err
    if command == "inspect":
        assert "fits, same weights" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert cli.main([*words, name]) != 0 and not (tmp_path / "out").exists()


def test_the_page_generates_with_the_version_that_it_is_told_to(base, tmp_path):
    name, flag, value = base
    (tmp_path / "adapters").mkdir()
    Worker(name, Library(tmp_path / "adapters"), device="cpu", **{flag: value}).close()
    with pytest.raises(OSError):
        Worker(name, Library(tmp_path / "adapters"), device="cpu")


def test_a_version_without_a_base_is_refused(given, capsys):
    assert cli.main(["inspect", str(given / "adapter"), "--variant", "fp16"]) != 0
    assert "--variant and --revision are those of the base: give --base as well" in capsys.readouterr().err
