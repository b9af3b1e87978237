"""What `export` and `merge` refuse: adapters of control hold more than their formats can."""

import argparse

import pytest
from helpers import zoo

from ether_diffusion.commands import export, merge
from ether_diffusion.commands import inspect as command
from ether_diffusion.errors import InputError


def inspect(capsys, *arguments) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "light",
            "{path}: holds a control encoder, which {result} has no place for; load it with EtherControlPipeline",
        ),
        ("controlnet", r"{path}: holds modules .*\(controlnet: controlnet_cond_embedding, .*ControlNetModel.from_pre"),
    ],
)
@pytest.mark.parametrize(
    ("exporter", "result", "flags"), [(export, "a LoRA", ["--to", "kohya"]), (merge, "a stock pipeline", [])]
)
def test_what_only_a_control_pipeline_can_hold_is_not_exported(
    tiny_pipeline_folder, tmp_path, kind, message, exporter, result, flags
):
    path = zoo.save_control(kind, tiny_pipeline_folder, tmp_path / "adapter")
    parser = argparse.ArgumentParser()
    exporter.add_arguments(parser)
    words = ["--base", tiny_pipeline_folder, "--adapter", path, "--output_dir", tmp_path / "out"]
    args = parser.parse_args([*flags, *map(str, words)])
    with pytest.raises(InputError, match=message.format(path=path, result=result)):
        exporter.run(args)
    assert not (tmp_path / "out").exists()
