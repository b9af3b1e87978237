"""What holds for every test of training."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from helpers import pipelines
from helpers.class_images import SEED, STEPS, Watched, prior
from helpers.flow_zoo import SIDES, make
from helpers.scripts import reset_accelerate
from helpers.zoo import sdxl
from PIL import Image

from ether_diffusion.training.class_images import generate_class_images
from ether_diffusion.training.families import ModelSource, StableDiffusion


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """No devices and no precision of the test before."""
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    datasets.disable_progress_bars()  # which would stand between the lines that tests read
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tiny_pipeline_folder) -> dict[str, Path]:
    """A pipeline of each kind."""
    folder = tmp_path_factory.mktemp("bases")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    torch.manual_seed(0)
    sdxl(pipe).save_pretrained(folder / "sdxl")
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    pipe.save_pretrained(folder / "sd-v")
    return {"sd": tiny_pipeline_folder, "sdxl": folder / "sdxl", "sd v": folder / "sd-v"}


@pytest.fixture
def watched():
    """A family of its own for every test."""
    return type("Watched", (Watched,), {"loaded": []})


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def generate(tiny_pipeline_folder, accelerator, watched):
    """Generate what is missing in a folder, with options; two denoising steps."""

    def call(folder, *, model=tiny_pipeline_folder, precision="no", seed=SEED, **options):
        source = ModelSource(str(model))
        return generate_class_images(
            source, watched, prior(folder, **options), accelerator, precision=precision, seed=seed, target=(16, 16),
            num_inference_steps=STEPS,
        )  # fmt: skip

    return call


@pytest.fixture(scope="session")
def flow_bases(tmp_path_factory):
    """Name -> folder of a small pipeline, made once."""
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / name
            make(name, made[name].parent).save_pretrained(made[name])
        return made[name]

    return base


@pytest.fixture
def on(flow_bases) -> Callable[[str], tuple[object, ...]]:
    """Flags that name a small pipeline and a size that it can have."""
    return lambda name: ("--pretrained_model_name_or_path", flow_bases(name), "--resolution", SIDES.get(name, 16))


@pytest.fixture(scope="session")
def references(tmp_path_factory, photographs) -> Path:
    """A reference image for each photograph, of its name and another kind."""
    folder = tmp_path_factory.mktemp("references")
    for k, path in enumerate(sorted(photographs.iterdir())):
        Image.open(path).convert("L").rotate(90 * k).convert("RGB").save(folder / f"{path.stem}.jpg")
    return folder


@pytest.fixture(scope="module")
def opened(tiny_pipeline_folder):
    return pipelines.open_pipeline(tiny_pipeline_folder)


@pytest.fixture(scope="module")
def base_image(opened):
    return pipelines.generate(opened)


@pytest.fixture
def blueprint(tiny_pipeline_folder):
    return StableDiffusion.read_blueprint(ModelSource(str(tiny_pipeline_folder)))
