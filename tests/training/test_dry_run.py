"""What a dry run tells of parameters and memory, against the model that it did not read."""

import re

import pytest
from diffusers import DiffusionPipeline
from helpers.flow_runs import QUICK
from helpers.flow_zoo import PIPELINES
from helpers.scripts import tensors

from ether_diffusion.training.families import ModelSource, family_at
from ether_diffusion.training.memory import format_bytes


@pytest.fixture(params=list(PIPELINES))
def name(request) -> str:
    return request.param


def test_a_dry_run_tells_parameters_and_memory_and_leaves_nothing(name, flow_bases, on, train, capsys, tmp_path):
    base = flow_bases(name)
    result, folder = train(*on(name), *QUICK, "--dry_run")
    told = capsys.readouterr().out
    assert result is None and not folder.exists()
    stock = DiffusionPipeline.from_pretrained(base)
    for component in (*family_at(ModelSource(str(base))).text_encoders, "vae", "transformer"):
        size = 4 * sum(each.numel() for each in getattr(stock, component).parameters())
        assert re.search(rf"^  {component} +{re.escape(format_bytes(size))}$", told, re.M), told
    train(*on(name), *QUICK)
    count = sum(value.numel() for value in tensors(folder).values())
    assert f": {count:,} parameters at 0.05" in told and "activations" in told


def test_a_dry_run_of_a_quantised_base_with_checkpointing_needs_less(on, train, capsys):
    told = []
    for flags in ((), ("--quantize", "nf4", "--mixed_precision", "bf16"), ("--gradient_checkpointing",)):
        train(*on("flux"), *QUICK, *flags, "--dry_run")
        lines = capsys.readouterr().out.splitlines()
        told.append({line.split()[0]: line.split()[-2:] for line in lines if line.startswith("  ")})
    assert told[1]["transformer"] != told[0]["transformer"] and told[2]["activations"] != told[0]["activations"]
    assert told[2]["transformer"] == told[0]["transformer"]


def bytes_of(told: str, part: str) -> float:
    """What a dry run tells of a part."""
    size, unit = re.search(rf"{part}:? +([\d.]+) (B|kB|MB|GB)", told).groups()
    return float(size) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_the_peak_of_a_dry_run_counts_what_is_in_memory_together(on, train, capsys, references, tmp_path):
    def told(*flags):
        train(*on("kontext"), *QUICK, *flags, "--dry_run")
        return capsys.readouterr().out

    usual, trained = told(), told("--train_text_encoder")
    parts = {line.strip().split("  ")[0] for line in usual.splitlines() if line.startswith("  ")}
    sizes = {part: bytes_of(usual, part) for part in parts}
    encoding = sizes["text_encoder"] + sizes["text_encoder_2"]
    peak = max(encoding, sum(sizes.values()) - encoding)
    assert bytes_of(usual, "peak") == pytest.approx(peak, rel=0.05)
    assert bytes_of(trained, "peak") == pytest.approx(sum(bytes_of(trained, part) for part in parts), rel=0.05)
    prior = ("--with_prior_preservation", "--class_prompt", "toy", "--class_data_dir", tmp_path / "class")
    activations = sizes["activations"]
    assert bytes_of(told(*prior), "activations") == pytest.approx(2 * activations, rel=0.05)
    assert bytes_of(told("--reference_dir", references), "activations") > activations


def test_a_dry_run_says_of_a_unet_that_activations_are_not_estimated(train, capsys):
    train("--dry_run")
    assert "with all parts in memory; activations are not estimated" in capsys.readouterr().out
