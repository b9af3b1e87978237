"""ControlNets of transformers: evaluated and inspected by the commands."""

import json

import pytest
from helpers.controlnets import controlnets_of, drawn, make_deep

from ether_diffusion import EtherConfig
from ether_diffusion.commands import main as cli
from ether_diffusion.control.controlnets import with_controlnet
from ether_diffusion.miniature.control_data import write_control_data


@pytest.fixture(params=["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def pipe(request, tmp_path):
    pipe = make_deep(request.param, tmp_path)
    pipe.save_pretrained(tmp_path / "base")
    return pipe


def evaluate(*words: object) -> int:
    return cli.main(["evaluate-control", *map(str, words)])


def test_a_transformer_under_a_controlnet_is_evaluated(pipe, tmp_path, capsys):
    drawn(controlnets_of(pipe).copy_of(pipe.transformer)).save_pretrained(tmp_path / "out" / "controlnet")
    folder = write_control_data(tmp_path / "data", 2, "t", "circles")
    given = ("--base", tmp_path / "base", "--adapter", tmp_path / "out", "--data_dir", folder)
    given += ("--num_inference_steps", 2, "--evaluator", "edges", "--fid_features", "none")
    assert evaluate(*given, "--output_dir", tmp_path / "with") == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "with" / "report.json").read_text())["scores"]
    assert scores["with_control"] != scores["without_control"]
    none = ("--controlnet_conditioning_scale", 0)
    assert evaluate(*given, *none, "--output_dir", tmp_path / "none") == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "none" / "report.json").read_text())["scores"]
    assert scores["with_control"] == scores["without_control"]  # from the same noise


def test_a_file_for_a_controlnet_fits_a_copy_with_as_many_layers(pipe, tmp_path, capsys):
    nets = controlnets_of(pipe, num_double_layers=1)
    controlnet = drawn(nets.copy_of(pipe.transformer))
    controlnet.add_adapter(EtherConfig(method="ether", init_weights=False, target_modules=["to_q"]), "default")
    stock = with_controlnet(pipe, controlnet)
    stock.save_ether_weights(tmp_path, "default", replaced_modules={"controlnet": nets.own_names(controlnet)})
    assert cli.main(["inspect", str(tmp_path), "--base", str(tmp_path / "base")]) == 0
    assert "fits, same weights" in capsys.readouterr().out
