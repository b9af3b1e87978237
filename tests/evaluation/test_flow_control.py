"""Control of transformers: evaluated, inspected and analysed by the commands."""

import json

import pytest
from helpers.flow_control import conv_encoder, latent_encoder, make_control
from helpers.flow_zoo import make

from ether_diffusion import EtherConfig
from ether_diffusion.commands import main as cli
from ether_diffusion.control.pipelines import over
from ether_diffusion.miniature.control_data import write_control_data


@pytest.fixture(params=["latent", "conv"])
def saved(request, tmp_path):
    """Folders of a base and of an adapter with control for it."""
    pipe = make_control("sd3", tmp_path)
    over(pipe._stock, pipe).save_pretrained(tmp_path / "base")
    config = EtherConfig(method="ether_plus", init_weights=False, target_modules=["to_q"])
    pipe.transformer.add_adapter(config, "map")
    make_encoder = {"latent": latent_encoder, "conv": conv_encoder}[request.param]
    pipe.add_control("map", make_encoder(pipe))
    pipe.save_ether_weights(tmp_path / "adapter", "map")
    return tmp_path / "base", tmp_path / "adapter"


def evaluate(*words: object) -> int:
    return cli.main(["evaluate-control", *map(str, words)])


def test_a_transformer_under_control_is_evaluated(saved, tmp_path, capsys):
    base, adapter = saved
    folder = write_control_data(tmp_path / "data", 2, "t", "circles")
    given = ("--base", base, "--adapter", adapter, "--data_dir", folder, "--num_inference_steps", 2)
    given += ("--evaluator", "edges", "--fid_features", "none")
    assert evaluate(*given, "--output_dir", tmp_path / "out") == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["guidance_scale"] == 7.0 and report["settings"]["height"] == 16
    assert report["scores"]["with_control"] != report["scores"]["without_control"]
    none = ("--controlnet_conditioning_scale", 0, "--guidance_scale", 3)
    assert evaluate(*given, *none, "--output_dir", tmp_path / "none") == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "none" / "report.json").read_text())
    assert report["settings"]["guidance_scale"] == 3


def test_a_base_without_control_is_told_before_an_image_is_generated(saved, tmp_path, capsys):
    folder = write_control_data(tmp_path / "data", 2, "t", "circles")
    (tmp_path / "other").mkdir()
    make("kontext", tmp_path / "other").save_pretrained(tmp_path / "editor")
    given = ("--base", tmp_path / "editor", "--adapter", saved[1], "--data_dir", folder)
    assert evaluate(*given, "--fid_features", "none", "--output_dir", tmp_path / "out") == 1
    assert "is a FluxKontextPipeline; control is for StableDiffusionPipeline, " in capsys.readouterr().err


def test_what_a_file_holds_and_whether_it_fits_is_told(saved, tmp_path, capsys):
    base, adapter = saved
    assert cli.main(["inspect", str(adapter), "--base", str(base)]) == 0
    told = capsys.readouterr().out
    assert "fits, same weights" in told and "control encoder" in told
    assert cli.main(["analyze", str(adapter), "--base", str(base)]) == 0
    assert "attn.to_q" in capsys.readouterr().out
