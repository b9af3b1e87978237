"""`ether-diffusion generate`: from lines of JSON to images."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.scripts import launch
from PIL import Image

from ether_diffusion import miniature
from ether_diffusion.commands.main import main
from ether_diffusion.demo.settings import read_image

SHIPPED = miniature.FOLDER.parent / "adapters"
LINES = [
    {"prompt": "a photo of sks toy on a red background", "adapter": "toy-1", "steps": 3},
    {"prompt": "a photo of sks house", "adapter": {"house-1": 0.8}, "seed": 3, "steps": 4, "guidance": 3.0},
    {"prompt": "a red circle", "steps": 2, "negative_prompt": "blue"},
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def command(prompts, output_dir, *flags: str) -> list[str]:
    folders = ["--adapters", str(SHIPPED), "--prompts", str(prompts), "--output_dir", str(output_dir)]
    return ["generate", *folders, "--max_batch", "8", *flags]


def index(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def test_each_line_gets_the_image_of_its_adapter_and_settings(prompts, tmp_path):
    assert main(command(prompts, tmp_path / "out", "--seed", "40")) == 0
    rows = index(tmp_path / "out")
    assert [row["seed"] for row in rows] == [40, 3, 42]
    for line, row in zip(LINES, rows, strict=True):
        pipe = miniature.load_pipeline()
        pipe.set_progress_bar_config(disable=True)
        adapters = {"toy-1": 1.0} if line.get("adapter") == "toy-1" else line.get("adapter", {})
        for name, strength in adapters.items():
            pipe.load_ether_weights(SHIPPED / name, adapter_name=name)
            pipe.set_adapters([name], [strength])
        expected = pipe(
            line["prompt"],
            negative_prompt=line.get("negative_prompt"),
            num_inference_steps=line["steps"],
            guidance_scale=line.get("guidance", 7.5),
            generator=torch.Generator().manual_seed(row["seed"]),
        ).images[0]
        path = tmp_path / "out" / row["file_name"]
        far = np.abs(np.asarray(Image.open(path), dtype=int) - np.asarray(expected, dtype=int)).max()
        assert far <= 1
        settings, _ = read_image(path)
        assert (settings.prompt, dict(settings.adapters), settings.steps) == (line["prompt"], adapters, line["steps"])
        assert (settings.seed, settings.guidance) == (row["seed"], line.get("guidance", 7.5))


def test_it_goes_on_where_it_was_stopped(prompts, tmp_path):
    assert main(command(prompts, tmp_path / "out")) == 0
    paths = [tmp_path / "out" / row["file_name"] for row in index(tmp_path / "out")]
    written = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    assert main(command(prompts, tmp_path / "out")) == 0
    now = [path.stat().st_mtime_ns for path in paths]
    assert now[0] == written[0] and now[2] == written[2] and now[1] > written[1]


def test_one_prompt_needs_no_file(tmp_path):
    flags = ["--adapters", str(SHIPPED), "--adapter", "toy-1=0.5", "--num_images", "2", "--steps", "2"]
    assert main(["generate", "--prompt", "a toy", "--output_dir", str(tmp_path), "--max_batch", "4", *flags]) == 0
    assert [(row["seed"], row["adapter"]) for row in index(tmp_path)] == [(0, {"toy-1": 0.5}), (1, {"toy-1": 0.5})]
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize(
    "flags, told",
    [
        ([], "--prompts: give it or --prompt, one of the two"),
        (["--prompt", "a", "--prompts", "b"], "one of the two"),
        (["--prompt", "a", "--adapter", "dog"], "--adapters: missing; the adapter dog is asked for"),
        (
            ["--prompt", "a", "--adapter", "toy-2", "--adapters", str(SHIPPED)],
            "there is no adapter 'toy-2'; near it: toy-1",
        ),
        (["--prompt", "a", "--adapter", "dog=much"], "--adapter: got 'dog=much', needs NAME or NAME=STRENGTH"),
        (["--prompt", "a", "--num_images", "0"], "--num_images: got 0, needs 1 or more"),
        (["--prompt", "a", "--adapters", "nowhere"], "there is no such folder"),
        (["--prompt", "a", "--size", "64"], "--prompt: size: got '64'"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_loaded_or_written(flags, told, tmp_path, capsys):
    assert main(["generate", "--base", "nowhere/at-all", "--output_dir", str(tmp_path / "out"), *flags]) == 1
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_line_that_fails_does_not_keep_the_others_from_their_images(tmp_path, capsys):
    adapters = shutil.copytree(SHIPPED, tmp_path / "adapters")
    (adapters / "broken.safetensors").write_bytes(b"no adapter")
    lines = [*LINES[:2], {"prompt": "a toy", "adapter": "broken", "steps": 2}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--adapters", str(adapters), "--prompts", str(prompts), "--output_dir", str(tmp_path / "out")]
    assert main(["generate", *flags, "--max_batch", "4"]) == 1
    assert "1 of 3 images failed; the first, 'a toy'" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.mark.slow
def test_two_processes_share_the_lines(prompts, tmp_path):
    done = launch("ether_diffusion.commands.main", *command(prompts, tmp_path / "out"), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(command(prompts, tmp_path / "one")) == 0
    names = sorted(path.name for path in (tmp_path / "one").glob("*.png"))
    assert len(names) == 3 and sorted(path.name for path in (tmp_path / "out").glob("*.png")) == names
    for name in names:
        two, one = (np.asarray(Image.open(tmp_path / folder / name), dtype=int) for folder in ("out", "one"))
        assert np.abs(two - one).max() <= 1
