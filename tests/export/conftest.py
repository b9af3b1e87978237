"""Bases of every family with adapters on file."""

import pytest
from helpers.lora import (
    STRENGTHS,
    Family,
    generate_any,
    make_flux,
    make_sdxl,
    save_adapter,
    targets_of,
)
from helpers.tiny import make_pipeline

from ether_diffusion.export.merge import open_adapted


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux"])
def family(request, tmp_path_factory, tiny_tokenizer) -> Family:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    make = {"sd": make_pipeline, "sdxl": make_sdxl, "flux": make_flux}[name]
    make(tiny_tokenizer).save_pretrained(folder / "base")
    # FLUX's fused layers are read back by diffusers at FLUX's own width only: single blocks have their own tests.
    targets = targets_of(name, with_all=False)
    adapters = [
        save_adapter(folder, folder / "base", "dog", targets, 1, num_blocks=2),
        save_adapter(
            folder, folder / "base", "style", targets, 2, method="ether_plus", exclude_modules=r".*to_v|.*fc1"
        ),
    ]
    pipe, _ = open_adapted(folder / "base", adapters, STRENGTHS)
    pipe.set_progress_bar_config(disable=True)
    return Family(name, folder / "base", adapters, generate_any(pipe))
