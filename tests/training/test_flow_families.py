"""Every transformer family says and hears what its stock pipeline does: the conformance test."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.flow_zoo import PIPELINES, SIDES, SIZED, WITH_PROCESSORS, make
from helpers.scripts import ROOT
from PIL import Image
from torch import Tensor
from transformers.utils import is_torchvision_available

from ether_diffusion import EtherConfig
from ether_diffusion.errors import InputError
from ether_diffusion.images import to_pixels
from ether_diffusion.tokens import from_tokens, join_patches
from ether_diffusion.training.families import Family, ModelSource, families, family_at, family_of, flow
from ether_diffusion.training.families.qwen_edit import QwenImageEdit, QwenImageEditPlus
from ether_diffusion.training.families.unet import UNetFamily
from ether_diffusion.training.methods.injection import add_adapters, trained_parameters

SHAPES = [(1, 1), (1, 2), (2, 1)]
"""Sizes of images, in sides of the smallest square."""
PROMPTS = ["a red dog on a mat", "", "hut"]
WITHOUT_GUIDANCE = {
    "z_image": {"guidance_scale": 0.0},
    "krea2": {"guidance_scale": 0.0},
    "qwen": {},
    "qwen_edit": {},
    "qwen_edit_plus": {},
}
"""What turns guidance off; a guidance of 1 where nothing is said, which is also what transformers are told of it."""
EDITORS = {
    "kontext": {"_auto_resize": False},
    "klein": {},
    "flux2": {},
    "qwen_edit": {},
    "qwen_edit_plus": {},
}
"""Pipelines that take a reference image, and what keeps its size."""
READS_REFERENCES = tuple(WITH_PROCESSORS)
"""Editors whose text encoders see the reference image, without which they do nothing."""
TAKEN_AT = {(64, 64): (1024, 1024), (64, 256): (512, 2048)}
"""Size at which these editors encode a reference image, by its own."""
PATCHES_ARE_CHANNELS = ["klein", "flux2"]
DETERMINISTIC = ["klein", "flux2", "sana"]
"""Pipelines whose autoencoders give no distribution, or of which only the mean is taken."""
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


WITHOUT_TORCHVISION = pytest.mark.skipif(
    not is_torchvision_available(), reason="images for text encoders: torchvision"
)


@pytest.fixture(
    scope="module",
    params=[
        *PIPELINES,
        *(pytest.param(name, marks=[WITHOUT_TORCHVISION, pytest.mark.slow]) for name in WITH_PROCESSORS),
    ],
)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(name) / name
    make(name, folder.parent).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(folder) -> DiffusionPipeline:
    return opened(folder)


def opened(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass
class Step:
    """What one call of `scheduler.step` received: the velocity, the level of noise, and the noisy latents."""

    velocity: Tensor
    level: float
    noisy: Tensor


def inputs_of(name: str, size: tuple[int, int], prompt: str, reference: Image.Image | None = None) -> dict[str, Any]:
    """What the stock pipeline is called with, guidance off."""
    height, width = size
    inputs = {"prompt": prompt, "height": height, "width": width, "num_inference_steps": 3}
    inputs |= WITHOUT_GUIDANCE.get(name, {"guidance_scale": 1.0})
    inputs |= SIZED.get(name, {})
    if name == "kontext":  # it would take another size of the same proportions
        inputs["max_area"] = height * width
    if reference is None and name in READS_REFERENCES:
        reference = REFERENCE
    if reference is not None:
        inputs |= {"image": reference, **EDITORS[name]}
    return inputs | {"generator": torch.Generator().manual_seed(0)}


def read_with(name: str, prompts: list[str], reference: Image.Image | None = None) -> dict[str, Any]:
    """What the family's text encoders are told besides the prompts."""
    seen = [to_pixels(reference or REFERENCE)]
    return {"references": [seen] * len(prompts)} if name in READS_REFERENCES else {}


def latents_of(name: str, family: Family, reference: Image.Image) -> list[Tensor]:
    """A reference image as the pipeline encodes it for the transformer."""
    if name in READS_REFERENCES:
        height, width = TAKEN_AT[reference.height, reference.width]
        reference = reference.resize((width, height), Image.Resampling.LANCZOS)
    with torch.no_grad():
        return [family.latents.draw(family.latents.encode(to_pixels(reference)), None)[None]]


def steps_of(pipe: DiffusionPipeline, **inputs: Any) -> list[Step]:
    """The steps that a stock pipeline takes."""
    taken, step = [], pipe.scheduler.step

    def record(velocity, time, noisy, **options):
        taken.append(Step(velocity.clone(), float(time) / 1000, noisy.clone()))
        return step(velocity, time, noisy, **options)

    pipe.scheduler.step = record
    pipe(output_type="latent", **inputs)
    pipe.scheduler.step = step
    return taken


def as_latents(name: str, values: Tensor, family: Family, size: tuple[int, int]) -> Tensor:
    """What a pipeline keeps as tokens, as the family has it: (b, c, h, w)."""
    if values.ndim == 4:
        return values
    like = torch.empty(1, 1, *(side // family.pixel_multiple for side in size))
    latents = from_tokens(values, like)
    return latents if name in PATCHES_ARE_CHANNELS else join_patches(latents)


@pytest.fixture(params=SHAPES, ids=str)
def size(name, request) -> tuple[int, int]:
    return scaled(name, *request.param)


def scaled(name: str, *shape: int) -> tuple[int, ...]:
    """A size in pixels that the pipeline can have."""
    return tuple(side * SIDES.get(name, 16) for side in shape)


def photograph(size: tuple[int, int], seed: int = 0) -> Image.Image:
    height, width = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_predicts_what_the_stock_pipeline_gives_to_its_scheduler(name, pipe, size):
    for prompt in PROMPTS:
        steps = steps_of(pipe, **inputs_of(name, size, prompt))
        family = family_of(pipe)
        known = family.conditioning([prompt], **read_with(name, [prompt]))
        references = latents_of(name, family, REFERENCE) if name in READS_REFERENCES else []
        given = (known, references) if references else (known,)
        assert len({step.level for step in steps}) == 3
        for step in steps:
            noisy, velocity = (as_latents(name, each, family, size) for each in (step.noisy, step.velocity))
            with torch.no_grad():
                answer = family.predict(noisy, torch.tensor([step.level]), *given)
            torch.testing.assert_close(answer, velocity, **CLOSE)


REFERENCE = photograph((64, 64))


@pytest.mark.parametrize("of", [(64, 64), (64, 256)], ids=str)
def test_predicts_with_a_reference_what_the_stock_pipeline_does(name, pipe, of):
    if name not in EDITORS:
        pytest.skip("takes no reference image")
    reference, size = photograph(of), scaled(name, 1, 2)
    family = family_of(pipe)
    conditioning = family.conditioning(PROMPTS[:1], **read_with(name, PROMPTS[:1], reference))
    seen = latents_of(name, family, reference)
    for step in steps_of(pipe, **inputs_of(name, size, PROMPTS[0], reference)):
        noisy, velocity = (as_latents(name, each, family, size) for each in (step.noisy, step.velocity))
        levels = torch.tensor([step.level])
        with torch.no_grad():
            answer = family.predict(noisy, levels, conditioning, seen)
            blind = family.predict(noisy, levels, conditioning)
        torch.testing.assert_close(answer, velocity, **CLOSE)
        assert (answer - blind).abs().max() > 1e-3


def test_decodes_the_latents_to_the_image_of_the_pipeline(name, pipe, size):
    inputs = inputs_of(name, size, PROMPTS[0])
    image = pipe(output_type="pt", **inputs).images[0]
    family, steps = family_of(pipe), []
    scheduler = pipe.scheduler.step
    pipe.scheduler.step = lambda *given, **options: steps.append(scheduler(*given, **options)) or steps[-1]
    pipe(output_type="latent", **inputs_of(name, size, PROMPTS[0]))
    latents = as_latents(name, steps[-1][0], family, size)
    with torch.no_grad():
        decoded = family.latents.decode(latents)[0]
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), image, atol=1e-5, rtol=0)


def test_an_image_and_its_latents_have_the_same_statistics_as_in_the_pipeline(name, pipe, size):
    """Latents of many draws have the mean of the distribution; decoding undoes the normalisation exactly."""
    family = family_of(pipe)
    space = family.latents
    with torch.no_grad():
        statistics = space.encode(to_pixels(photograph(size)))
        mean = space.draw(statistics, None)
        again = [space.draw(statistics, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(again[0], again[1])
    assert torch.equal(again[0], again[2]) == (name in DETERMINISTIC)
    factor = family.pixel_multiple // (1 if name in PATCHES_ARE_CHANNELS else family.patch)
    assert mean.shape[-2:] == tuple(side // factor for side in size)


def test_a_batch_of_prompts_of_several_lengths_answers_as_each_alone(name, pipe):
    family = family_of(pipe)
    channels = family.latents.draw(family.latents.encode(to_pixels(photograph(scaled(name, 1, 1)))), None).shape
    noisy, levels = torch.randn(3, *channels), torch.tensor([0.1, 0.5, 0.9])
    conditioning = family.conditioning(PROMPTS, **read_with(name, PROMPTS))
    with torch.no_grad():
        together = family.predict(noisy, levels, conditioning)
        for k in range(3):
            alone = family.predict(noisy[k : k + 1], levels[k : k + 1], conditioning[k : k + 1])
            torch.testing.assert_close(together[k : k + 1], alone, **CLOSE)
    assert not torch.allclose(together[0], family.predict(noisy, levels, conditioning[::-1])[0])


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_checkpointing_leaves_the_gradients_as_they_are(name, pipe, method):
    family = family_of(pipe)
    config = EtherConfig(target_modules=family.targets, method=method)
    models, gradients = {"transformer": pipe.transformer}, []
    add_adapters(models, {"transformer": config}, seed=0)
    shape = family.latents.draw(family.latents.encode(to_pixels(photograph(scaled(name, 1, 1)))), None).shape
    noisy, levels = torch.randn(2, *shape), torch.tensor([0.3, 0.8])
    family.freeze_unused()
    parameters = trained_parameters(models, {"transformer": config})
    for checkpointing in (False, True):
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
            pipe.transformer.train()
        conditioning = family.conditioning(PROMPTS[:2], **read_with(name, PROMPTS[:2]))
        family.predict(noisy, levels, conditioning).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-7, rtol=1e-4)


def test_the_default_layers_are_those_of_attention_in_every_block(name, pipe):
    family = family_of(pipe)
    models = {"transformer": pipe.transformer}
    add_adapters(models, {"transformer": EtherConfig(target_modules=family.targets, method="ether")}, seed=0)
    adapted = {layer for layer, module in pipe.transformer.named_modules() if hasattr(module, "ether_u")}
    blocks = {".".join(layer.split(".")[:2]) for layer, _ in pipe.transformer.named_modules() if layer.count(".") == 1}
    blocks = {block for block in blocks if block.split(".")[1].isdigit() and "block" in block or "layers." in block}
    assert {".".join(layer.split(".")[:2]) for layer in adapted} >= blocks and len(adapted) >= 4 * len(blocks) - 4


# Components that are in memory only while they are needed -------------------------------------------------------


def test_a_component_has_its_weights_from_when_it_is_asked_for_until_it_is_offloaded(name, folder):
    source = ModelSource(str(folder))
    family = family_at(source).load(source, torch.float32)
    assert family.modules() == {}
    family.freeze(torch.device("cpu"))
    family.keep_prompts(PROMPTS, **read_with(name, PROMPTS))
    assert family.modules() == {}
    kept = family.conditioning(PROMPTS, **read_with(name, PROMPTS))
    assert family.modules() == {}, "kept prompts need no text encoder"
    whole = family_of(opened(folder)).conditioning(PROMPTS, **read_with(name, PROMPTS))
    for one, other in zip(kept, whole, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    family.component("transformer")
    assert set(family.modules()) == {"transformer"}


def test_generates_what_the_stock_pipeline_does_without_text_encoders_in_memory(name, folder):
    source, (height, width) = ModelSource(str(folder)), scaled(name, 1, 2)
    size = (
        {"height": height, "width": width}
        | SIZED.get(name, {})
        | ({"max_area": height * width} if name == "kontext" else {})
    )
    if name in READS_REFERENCES:
        size["image"] = REFERENCE
    seed = {"num_inference_steps": 2, "output_type": "np"}
    family = family_at(source).load(source, torch.float32)
    family.keep_prompts(PROMPTS, **read_with(name, PROMPTS))
    family.pipe.set_progress_bar_config(disable=True)
    image = family.generate(PROMPTS[:1], generator=torch.Generator().manual_seed(0), **seed, **size).images[0]
    assert set(family.modules()) == {"transformer", "vae"}
    stock = {"prompt": PROMPTS[0], "generator": torch.Generator().manual_seed(0), **seed, **size}
    if name.startswith("qwen"):
        stock["negative_prompt"] = " "
    np.testing.assert_allclose(image, opened(folder)(**stock).images[0], atol=1e-5)


def test_the_blueprint_asks_for_sizes_that_the_pipeline_takes(name, folder, pipe):
    source = ModelSource(str(folder))
    blueprint = family_at(source).read_blueprint(source)
    assert blueprint.resolution_multiple == family_of(pipe).pixel_multiple
    parameters = [each for model in blueprint.models.values() for each in model.parameters()]
    assert {parameter.device.type for parameter in parameters} == {"meta"}


@pytest.mark.parametrize("name", list(SIZED))
def test_a_pipeline_with_sizes_of_its_own_generates_the_one_that_is_asked_for(name, tmp_path):
    pipe = make(name, tmp_path)
    height, width = scaled(name, 1, 2)
    inputs = family_of(pipe).size_inputs((height, width))
    image = pipe("a dog", num_inference_steps=1, output_type="latent", **inputs).images[0]
    factor = family_of(pipe).pixel_multiple // family_of(pipe).patch
    assert image.shape[-2:] == (height // factor, width // factor)


@pytest.mark.parametrize("kind", [QwenImageEdit, QwenImageEditPlus])
@pytest.mark.parametrize("references", [None, [[]]], ids=["not given", "none"])
def test_an_editor_that_reads_images_refuses_prompts_without_one(tmp_path, kind, references):
    family = kind(make("qwen", tmp_path))
    with pytest.raises(InputError, match=f"a {kind.pipeline_class} reads prompts together with reference images"):
        family.conditioning(PROMPTS[:1], references)
    with pytest.raises(InputError, match="reference images"):
        family.generate(PROMPTS[:1])


@pytest.mark.parametrize(
    "pipeline, component, kind",
    [
        ("Flux2Pipeline", "tokenizer", "PixtralProcessor"),
        ("QwenImageEditPipeline", "processor", "Qwen2VLProcessor"),
        ("QwenImageEditPlusPipeline", "processor", "Qwen2VLProcessor"),
    ],
)
def test_a_pipeline_that_needs_torchvision_says_so_before_it_is_read(tmp_path, monkeypatch, pipeline, component, kind):
    monkeypatch.setattr(flow, "is_torchvision_available", lambda: False)
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": pipeline, component: ["transformers", kind]})
    )
    source = ModelSource(str(tmp_path))
    with pytest.raises(InputError, match=f"its {kind} needs torchvision: pip install torchvision"):
        family_at(source).read_blueprint(source)


def test_a_pipeline_that_no_family_covers_names_those_there_are(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "AllegroPipeline"}')
    with pytest.raises(InputError, match="is a AllegroPipeline; training covers .*FluxPipeline, .*ZImagePipeline"):
        family_at(ModelSource(str(tmp_path)))


# The page of families -------------------------------------------------------------------------------------------

TABLE = [line for line in (ROOT / "docs/families.md").read_text("utf-8").splitlines() if line.startswith("|")]
ROWS = [line.strip("| ").split(" | ") for line in TABLE[2:]]


def test_the_page_has_no_row_without_a_family():
    assert sorted(pipeline for _, pipeline, *_ in ROWS) == sorted(families())


@pytest.mark.parametrize("kind", [pytest.param(kind, id=name) for name, kind in families().items()])
def test_the_page_says_of_each_family_what_holds(kind):
    (row,) = [row for row in ROWS if row[1] == kind.pipeline_class]
    assert (row[3] == "–") == (not kind.trained_text_encoders)
    assert issubclass(kind, UNetFamily) or row[5] == str(kind.native_resolution)
