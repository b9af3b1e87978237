"""`ether-diffusion export` and `merge`: what they write, and what they refuse."""

import re

import pytest
import torch
from helpers import zoo
from safetensors.torch import load_file

from ether_diffusion.commands import main as cli


def test_the_command_line_exports_and_merges(one, tiny_pipeline_folder, tmp_path, capsys):
    given = ["--base", str(tiny_pipeline_folder), "--adapter", str(one), "--output_dir", str(tmp_path / "out")]
    assert (
        cli.main(["export", "--to", "kohya", "--rank", "auto", "--scale", "0.5", "--dtype", "bfloat16", *given]) == 0
    )
    out = capsys.readouterr().out
    assert "kohya_lora.safetensors: kohya, bfloat16" in out and "largest relative error" in out
    assert "1_dog: strength 0.5" in out
    assert cli.main(["merge", *given]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err
    assert cli.main(["merge", *given[:-1], str(tmp_path / "whole"), "--dtype", "float16"]) == 0
    whole = load_file(tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in whole.values()} == {torch.float16}


def test_the_command_line_says_what_is_wrong(one, tiny_pipeline_folder, wider_pipeline_folder, tmp_path, capsys):
    for changed, message in (
        (["--base", str(tmp_path / "nowhere")], "nowhere"),
        (["--adapter", str(tmp_path / "nothing")], "no such file or folder"),
        (["--base", str(wider_pipeline_folder)], "the adapter was made for another architecture"),
        (["--scale", "1", "0.5"], "1 adapters, but 2 strengths"),
        (["--weight_name", "../a.safetensors"], "is not the name of a .safetensors file"),
    ):
        given = {"--base": [str(tiny_pipeline_folder)], "--adapter": [str(one)], changed[0]: changed[1:]}
        words = [word for flag, values in given.items() for word in (flag, *values)]
        assert cli.main(["export", "--to", "kohya", "--output_dir", str(tmp_path / "out"), *words]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    with pytest.raises(SystemExit):
        cli.main(["export", "--rank", "many"])
    assert "got 'many', needs auto or a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "light",
            "{path}: holds a control encoder, which {result} has no place for; load it with EtherControlPipeline",
        ),
        ("controlnet", r"{path}: holds modules .*\(controlnet: controlnet_cond_embedding, .*of ControlNetModel"),
    ],
)
@pytest.mark.parametrize(
    ("command", "result"), [(["export", "--to", "kohya"], "a LoRA"), (["merge"], "a stock pipeline")]
)
def test_what_only_a_control_pipeline_can_hold_is_not_exported(
    tiny_pipeline_folder, tmp_path, capsys, kind, message, command, result
):
    path = zoo.save_control(kind, tiny_pipeline_folder, tmp_path / "adapter")
    given = ["--base", tiny_pipeline_folder, "--adapter", path, "--output_dir", tmp_path / "out"]
    assert cli.main([*command, *map(str, given)]) == 1
    assert re.search(message.format(path=path, result=result), capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
