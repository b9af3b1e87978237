"""Whatever the scripts are fed, they train, or say in one line what is wrong: a fuzzer's inputs, and no traceback."""

import io
import json
import os
import random
import shutil
import traceback
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from helpers import control_data
from helpers.images import gradient
from helpers.mutations import ODD, changed_bytes, changed_json, changed_text
from helpers.scripts import reset_accelerate

from ether_diffusion.training import control, dreambooth
from ether_diffusion.training.checkpoint_files import MANIFEST_NAME
from ether_diffusion.training.options import groups_of

FEW, MANY = 12, 250
"""Inputs of each kind in the fast run, and in the slow one."""

FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]
NOT_FUZZED = {
    "compile",  # takes a minute each
    "allow_tf32",  # holds for the whole process
    "push_to_hub", "dataset_name", "revision",  # would ask the network
    "max_train_steps", "num_train_epochs", "num_validation_images", "num_class_images", "num_inference_steps",
    "repeats", "resolution", "aspect_ratio_buckets", "rank", "train_batch_size", "gradient_accumulation_steps",
    "with_prior_preservation",
}  # fmt: skip
"""Flags whose odd values are mostly much work, which is what was asked for."""


class Feeder:
    """Makes inputs in a folder, each from a generator, and gives the script's main and its flags."""

    def __init__(self, folder: Path, base: Path, photographs: Path):
        self.folder, self.base, self.photographs = folder, base, photographs
        dreambooth.main([*self.flags(), "--checkpointing_steps=1"])
        self.checkpoint = folder / "out" / "checkpoint-1"

    def flags(self, **changed: object) -> list[str]:
        usual = {
            "pretrained_model_name_or_path": self.base,
            "instance_data_dir": self.photographs,
            "instance_prompt": "toy",
            "max_train_steps": 1,
            "train_batch_size": 1,
            "num_validation_images": 0,
            "output_dir": self.folder / "out",
        }
        return [f"--{name}={value}" for name, value in {**usual, **changed}.items() if value is not None]

    def images(self, draw: random.Random) -> tuple[Callable, list[str]]:
        """A damaged image of some format and mode."""
        kind, buffer = draw.choice(FORMATS), io.BytesIO()
        gradient(20, 16).convert(draw.choice(["RGB", "L"])).save(buffer, kind)
        (self.folder / "images").mkdir()
        suffix = draw.choice([".png", ".jpg", ".gif", ".bmp", ".tif", ".webp"])
        (self.folder / "images" / f"0{suffix}").write_bytes(changed_bytes(buffer.getvalue(), draw))
        return dreambooth.main, self.flags(instance_data_dir=self.folder / "images")

    def captions(self, draw: random.Random) -> tuple[Callable, list[str]]:
        """Lines of metadata that are none, or say something odd."""
        images = shutil.copytree(self.photographs, self.folder / "images")
        lines = [json.dumps({"file_name": f"{k}.png", "text": "a toy"}).encode() for k in range(3)]
        lines[draw.randrange(3)] = changed_text(lines[0].decode(), draw)
        (images / "metadata.jsonl").write_bytes(draw.choice([b"\n", b"\r\n", b"\n\n"]).join(lines))
        return dreambooth.main, self.flags(instance_data_dir=images)

    def pairs(self, draw: random.Random) -> tuple[Callable, list[str]]:
        """Pairs with odd lines of metadata, or a damaged image."""
        data = control_data.write(self.folder / "pairs", sizes=((20, 20), (20, 20)))
        file = draw.choice([data / "metadata.jsonl", data / "0.png", data / "maps" / "0.png"])
        if file.suffix == ".png":
            file.write_bytes(changed_bytes(file.read_bytes(), draw))
        else:
            first, *others = file.read_text().splitlines()
            file.write_bytes(b"\n".join([changed_text(first, draw), *(line.encode() for line in others)]))
        flags = self.flags(instance_data_dir=None, instance_prompt=None, train_data_dir=data)
        return control.main, flags

    def configs(self, draw: random.Random) -> tuple[Callable, list[str]]:
        """A file of flags with odd values."""
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in self.flags())
        given = {**flags, "learning_rate": 1e-3, "random_flip": True, "target_modules": ["to_q"], "seed": 1}
        changed = changed_json(given, draw)
        if isinstance(changed, dict) and draw.random() < 0.5:
            changed[draw.choice(_names())] = draw.choice(ODD)
        path = self.folder / f"flags{draw.choice(['.yaml', '.json'])}"
        text = json.dumps(changed) if path.suffix == ".json" else yaml.safe_dump(changed)
        path.write_bytes(changed_bytes(text.encode(), draw) if draw.random() < 0.2 else text.encode(errors="replace"))
        # Given once more, so that no odd value is a long run or a folder elsewhere.
        kept = [
            flag for flag in self.flags() if flag.startswith(("--max_train", "--output", "--num_val", "--train_b"))
        ]
        return dreambooth.main, [str(path), *kept]

    def bases(self, draw: random.Random) -> tuple[Callable, list[str]]:
        """A base model with an odd config, or damaged weights."""
        base = Path(shutil.copytree(self.base, self.folder / "base"))
        if draw.random() < 0.85:
            file = draw.choice(sorted(base.rglob("*.json")))
            file.write_bytes(changed_text(file.read_text(), draw))
        else:
            file = draw.choice(sorted([*base.rglob("*.safetensors"), *base.rglob("*.txt")]))
            file.write_bytes(changed_bytes(file.read_bytes(), draw))
        images = {"num_validation_images": 1, "num_inference_steps": 1} if draw.random() < 0.3 else {}
        return dreambooth.main, self.flags(pretrained_model_name_or_path=base, **images)

    def words(self, draw: random.Random) -> tuple[Callable, list[str]]:
        """Flags with values that are odd, of another flag, or missing."""
        flags = self.flags()
        for name in draw.sample(_names(), draw.randint(1, 3)):
            value = draw.choice(
                [*map(str, ODD), "ether", "cosine", "bf16", "1e-3", "latest", "--", "-1e-3", "１", "~"]
            )
            flags += draw.choice([[f"--{name}"], [f"--{name}", value], [f"--{name}={value}"], [f"-{name}", value]])
        return dreambooth.main, [flag.replace("\x00", "") for flag in flags]  # no command line can hold it

    def adapters(self, draw: random.Random) -> tuple[Callable, list[str]]:
        """An odd PEFT config."""
        config = {"peft_type": draw.choice(["LORA", "ETHER", "OFT", "IA3"]), "target_modules": ["to_q", "to_v"]}
        config |= {"r": 2} if config["peft_type"] == "LORA" else {}
        config |= {"num_blocks": 2, "two_sided": True} if config["peft_type"] == "ETHER" else {}
        (self.folder / "adapter.json").write_bytes(changed_text(json.dumps(config), draw))
        return dreambooth.main, self.flags(adapter_config=self.folder / "adapter.json", learning_rate=1e-3)

    def checkpoints(self, draw: random.Random) -> tuple[Callable, list[str]]:
        """A checkpoint with an odd manifest, or damaged files."""
        folder = self.folder / "out" / "checkpoint-1"
        shutil.copytree(self.checkpoint, folder)
        flags = self.flags()
        file = draw.choice([folder / MANIFEST_NAME, folder / MANIFEST_NAME, *sorted(folder.iterdir())])
        changed = changed_text(file.read_text(), draw) if file.suffix == ".json" else None
        file.write_bytes(changed or changed_bytes(file.read_bytes(), draw))
        return dreambooth.main, [*flags, "--max_train_steps=2", "--resume_from_checkpoint=latest"]


FOUND = {
    "words": [67, 85, 126, 237],
    "pairs": [182, 225],
    "captions": [32, 44, 53],
    "checkpoints": [18, 26, 42, 80, 165, 174, 186],
    "bases": [72, 73, 84, 94, 146, 157, 206],
    "adapters": [212],
}
"""Inputs that once left a traceback."""


def _names() -> list[str]:
    names = [each.name for group in groups_of(dreambooth.Options).values() for each in fields(group)]
    return [name for name in names if name not in NOT_FUZZED]


KINDS = [name for name in vars(Feeder) if not name.startswith("_") and name != "flags"]


def feed(kind: str, numbers: Iterable[int], folder: Path, base: Path, photographs: Path, capsys) -> list[str]:
    """What went wrong with the inputs of a kind that have these numbers."""
    faults, here, feeder = [], os.getcwd(), Feeder(folder, base, photographs)
    for number in numbers:
        place = folder / str(number)
        place.mkdir()
        os.chdir(place)  # for what an odd value lets a run write beside its folder
        try:
            capsys.readouterr()
            reset_accelerate()
            feeder.folder = place
            main, flags = getattr(feeder, kind)(random.Random(f"{kind} {number}"))
            main(flags)
        except SystemExit as stop:
            err = capsys.readouterr().err
            told = [line for line in err.splitlines() if "error: " in line]
            if stop.code not in (1, 2) or len(told) != 1 or "Traceback" in err:
                faults.append(f"{kind} {number}: exit code {stop.code}, {err[-500:]}")
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            faults.append(f"{kind} {number}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})")
        finally:
            os.chdir(here)
            shutil.rmtree(place)
    return faults


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_inputs_train_or_are_one_line(kind, count, tmp_path, tiny_pipeline_folder, photographs, capsys):
    precision = torch.backends.cuda.matmul.fp32_precision
    faults = feed(kind, range(count), tmp_path, tiny_pipeline_folder, photographs, capsys)
    torch.backends.cuda.matmul.fp32_precision = precision
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("kind", FOUND)
def test_inputs_that_once_left_a_traceback_leave_none(kind, tmp_path, tiny_pipeline_folder, photographs, capsys):
    faults = feed(kind, FOUND[kind], tmp_path, tiny_pipeline_folder, photographs, capsys)
    assert not faults, "\n".join(faults)
