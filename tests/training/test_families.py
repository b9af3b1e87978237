"""Model families: what each tells its denoiser and asks of it, and training of Stable Diffusion XL from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionXLPipeline
from helpers.pipelines import ONE_GREY_LEVEL, generate, training_images
from helpers.scripts import DREAMBOOTH, STEADY, launch
from helpers.tiny import make_pipeline
from helpers.zoo import controlnet, sdxl
from PIL import Image
from safetensors.torch import load_file

from ether_diffusion import EtherConfig
from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.errors import InputError
from ether_diffusion.training import dreambooth
from ether_diffusion.training.data.views import Framing, View, frame
from ether_diffusion.training.families import ModelSource, family_at, family_of
from ether_diffusion.training.families.sdxl import StableDiffusionXL
from ether_diffusion.training.methods.injection import add_adapters, trained_parameters
from ether_diffusion.training.objectives import DenoisingObjective, ImageSet

PROMPT = "a photo of sks toy"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-xl"
    sdxl(make_pipeline(tiny_tokenizer)).save_pretrained(folder)
    return folder


def open_sdxl(folder: Path, **options) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(sdxl_folder) -> StableDiffusionXLPipeline:
    return open_sdxl(sdxl_folder)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Images of three shapes: long, tall, and smaller than what the model is trained on."""
    folder = tmp_path_factory.mktemp("photographs")
    for k, size in enumerate([(60, 30), (20, 50), (12, 10)]):
        pixels = np.random.default_rng(k).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


# What the data says of a view. Sizes and corners are (height, width) and (top, left).


@pytest.mark.parametrize(
    ("size", "view", "expected"),
    [
        ((60, 30), View(0, left=5, top=0, flip=False), Framing((30, 60), (0, 5), (16, 16))),
        ((60, 30), View(0, left=5, top=0, flip=True), Framing((30, 60), (0, 32 - 16 - 5), (16, 16))),
        ((20, 50), View(0, left=0, top=9, flip=False), Framing((50, 20), (9, 0), (16, 16))),
        ((20, 50), View(0, left=0, top=9, flip=True), Framing((50, 20), (9, 0), (16, 16))),
        ((12, 8), View(0, left=3, top=0, flip=False), Framing((8, 12), (0, 6), (16, 16))),
    ],
    ids=["long", "long and mirrored", "tall", "tall and mirrored", "enlarged to twice its size"],
)
def test_a_framing_counts_in_the_scaled_and_mirrored_image(size, view, expected):
    assert frame(size, view, (16, 16)) == expected


@pytest.mark.parametrize("flip", [False, True])
def test_the_corner_of_a_framing_is_where_the_pixels_come_from(tmp_path, flip):
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None], 16, axis=0)  # every pixel's value is its column
    Image.fromarray(ramp).convert("RGB").save(tmp_path / "ramp.png")
    images = training_images(tmp_path)
    view = View(0, left=10, top=0, flip=flip)
    values = ((images.pixels(view)[0, 0] + 1) * 127.5).round().int().tolist()
    _, left = images.framing(view).crop_top_left
    columns = ramp[0, ::-1] if flip else ramp[0]
    assert values == columns[left : left + 16].tolist()


def test_time_ids_hold_original_size_crop_and_target_size_exactly_in_every_precision(pipe):
    framings = [Framing((1333, 3001), (0, 517), (1024, 1024)), Framing((50, 20), (9, 0), (16, 16))]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ids = [row["time_ids"].tolist() for row in family_of(pipe.to(dtype)).encode_framings(framings)]
        assert ids == [[1333, 3001, 0, 517, 1024, 1024], [50, 20, 9, 0, 16, 16]]


def test_the_size_and_crop_of_every_training_view_reach_the_unet(pipe, photographs):
    images = training_images(photographs, random_flip=True)
    family, samples, told = family_of(pipe), [3, 4, 5], []
    pipe.unet.add_time_proj.register_forward_hook(lambda module, inputs, output: told.append(inputs[0].view(3, 6)))
    DenoisingObjective(family, [ImageSet(images, family, seed=0)], trained=["unet"])(samples)
    framings = [images.framing(images.view(sample)) for sample in samples]
    assert told[0].tolist() == [row["time_ids"].tolist() for row in family.encode_framings(framings)]
    assert {each.original_size for each in framings} == {(30, 60), (50, 20), (10, 12)}


def test_stable_diffusion_is_told_nothing_of_size_and_crop(tiny_pipeline):
    assert family_of(tiny_pipeline).encode_framings([Framing((50, 20), (9, 0), (16, 16))]) == [{}]


# What the denoiser answers, and what it should.


def test_sdxl_predicts_what_the_unet_called_by_hand_predicts(pipe):
    family = family_of(pipe)
    noisy, timesteps, prompts = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), ["a dog", "a cat on a mat"]
    framings = [Framing((30, 60), (0, 5), (16, 16)), Framing((50, 20), (9, 0), (16, 16))]
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        ids = [
            pipe._get_add_time_ids(size, corner, (16, 16), torch.float32, pipe.text_encoder_2.config.projection_dim)
            for size, corner in [((30, 60), (0, 5)), ((50, 20), (9, 0))]
        ]
        added = {"text_embeds": pooled, "time_ids": torch.cat(ids)}
        expected = pipe.unet(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=added).sample
        told = family.encode_prompts(prompts)
        conditioning = [{**one, **other} for one, other in zip(told, family.encode_framings(framings), strict=True)]
        torch.testing.assert_close(family.predict(noisy, timesteps, conditioning), expected)
        others = family.encode_framings(framings[::-1])
        other = [{**one, **other} for one, other in zip(told, others, strict=True)]
        assert not torch.allclose(family.predict(noisy, timesteps, other), expected)


def test_stable_diffusion_predicts_what_the_unet_called_by_hand_predicts(tiny_pipeline):
    family = family_of(tiny_pipeline)
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    with torch.no_grad():
        states, _ = tiny_pipeline.encode_prompt(["a dog", "a cat"], "cpu", 1, False)
        expected = tiny_pipeline.unet(noisy, timesteps, encoder_hidden_states=states).sample
        answer = family.predict(noisy, timesteps, family.encode_prompts(["a dog", "a cat"]))
    torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize("build", [lambda tiny: tiny, sdxl], ids=["stable diffusion 2", "sdxl"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_targets_are_what_recovers_the_image(tiny_pipeline, build, prediction):
    pipe = build(tiny_pipeline)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    family = family_of(pipe)
    latents, noise, timesteps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 10, 700])
    noisy, target = family.noise.add(latents, noise, timesteps), family.noise.target(latents, noise, timesteps)
    alpha = family.noise.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
    if prediction == "epsilon":
        recovered = (noisy - (1 - alpha).sqrt() * target) / alpha.sqrt()
    else:
        recovered = alpha.sqrt() * noisy - (1 - alpha).sqrt() * target
    torch.testing.assert_close(recovered, latents, rtol=1e-3, atol=1e-3)


def test_latents_are_scaled_draws_of_the_autoencoder(tiny_pipeline):
    family = family_of(tiny_pipeline)
    pixels = torch.rand(3, 16, 16) * 2 - 1
    moments = family.latents.encode(pixels)
    mean = tiny_pipeline.vae.encode(pixels[None]).latent_dist.mode()[0] * tiny_pipeline.vae.config.scaling_factor
    torch.testing.assert_close(family.latents.draw(moments, None), mean)
    draws = [family.latents.draw(moments, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_latents_are_encoded_in_float32_where_float16_overflows(sdxl_folder, caplog):
    pixels = torch.rand(3, 16, 16) * 2 - 1
    half = open_sdxl(sdxl_folder, dtype=torch.float16)
    weight = half.vae.encoder.conv_in.weight.data
    weight.copy_(weight.float() * 6e4 / weight.abs().max())  # finite in float16, sums of nine are not
    assert not half.vae.encode(pixels[None].half()).latent_dist.mode().isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):  # as the training step runs in mixed precision
        moments = family_of(half).latents.encode(pixels)
    assert half.vae.dtype == torch.float16 and not caplog.records
    exact = half.vae.float().encode(pixels[None]).latent_dist.parameters[0]
    assert exact.isfinite().all() and torch.equal(moments, exact)


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_the_loss_moves_every_trained_vector_of_the_unet_and_both_encoders(pipe, photographs, method):
    family = family_of(pipe)
    family.freeze(torch.device("cpu"))
    models = {name: family.component(name) for name in COMPONENTS}
    configs = {name: EtherConfig(method=method, num_blocks=2) for name in COMPONENTS}
    add_adapters(models, configs, seed=0)
    adapted = {name for name, _ in vectors(models)}
    objective = DenoisingObjective(
        family, [ImageSet(training_images(photographs), family, seed=0)], trained=COMPONENTS
    )
    objective([0, 1]).mean().backward()
    moved = {name for name, vector in vectors(models) if vector.grad is not None and vector.grad.abs().max() > 0}
    assert moved == {name for name, vector in vectors(models)}
    assert len(moved) == len(trained_parameters(models, configs))
    # hidden_states[-2] of the first encoder leaves its last layer out, so nothing there can learn.
    left_out = adapted - moved
    assert left_out and all(name.startswith("text_encoder.encoder.layers.1.") for name in left_out)


def vectors(models) -> list[tuple[str, torch.nn.Parameter]]:
    """Name -> trained vector over all components."""
    return [
        (f"{component}.{name}", parameter)
        for component, model in models.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


# Which pipelines are covered.


def test_a_saved_sdxl_pipeline_is_recognised_and_its_size_read_from_the_config(sdxl_folder):
    source = ModelSource(str(sdxl_folder))
    assert family_at(source) is StableDiffusionXL
    blueprint = StableDiffusionXL.read_blueprint(source)
    assert set(blueprint.models) == set(COMPONENTS)
    assert all(parameter.is_meta for model in blueprint.models.values() for parameter in model.parameters())
    assert (blueprint.native_resolution, blueprint.resolution_multiple) == (16, 2)


def test_a_pipeline_of_another_family_is_told_what_is_supported(tiny_pipeline):
    with pytest.raises(
        InputError,
        match="is a StableDiffusionControlNetPipeline; training covers .*StableDiffusionPipeline, .*ZImagePipeline",
    ):
        family_of(controlnet(tiny_pipeline))


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"text_encoder_2": ["transformers", "T5EncoderModel"]}, "needs a CLIPTextModelWithProj"),
        ("model_index.json", {"text_encoder": [None, None]}, "its text_encoder is a None, needs a CLIPTextModel"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type None, needs 'text_time'"),
        ("text_encoder_2/config.json", {"projection_dim": 24}, "takes 64 numbers .* 6 sizes make 72"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "covers epsilon, v_prediction"),
    ],
)
def test_an_sdxl_that_training_does_not_cover_is_refused_by_its_configs(sdxl_folder, tmp_path, file, values, message):
    for path in sdxl_folder.rglob("*.json"):
        copy = tmp_path / path.relative_to(sdxl_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    StableDiffusionXL.read_blueprint(ModelSource(str(tmp_path)))
    edit(tmp_path / file, **values)
    with pytest.raises(InputError, match=message):
        StableDiffusionXL.read_blueprint(ModelSource(str(tmp_path)))


def test_a_scheduler_without_ddpm_noise_is_refused(pipe):
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(InputError, match="pipe: its scheduler has no beta_schedule"):
        family_of(pipe)


# Training from the command line.


def flags_of(sdxl_folder: Path, photographs: Path, output_dir: Path) -> list[str]:
    values = {
        "--pretrained_model_name_or_path": sdxl_folder,
        "--instance_data_dir": photographs,
        "--instance_prompt": PROMPT,
        "--output_dir": output_dir,
        "--learning_rate": 0.05,
    }
    return [str(word) for pair in values.items() for word in pair] + ["--train_text_encoder", "--random_flip"]


def test_the_script_trains_saves_generates_and_describes_sdxl(sdxl_folder, photographs, tmp_path):
    flags = [*flags_of(sdxl_folder, photographs, tmp_path / "toy"), "--max_train_steps", "2"]
    flags += ["--num_validation_images", "1", "--num_inference_steps", "2", "--gradient_checkpointing"]
    done = launch(DREAMBOOTH, *flags)
    assert done.returncode == 0, done.stderr
    assert {"README.md", "grid.png", WEIGHTS_NAME} <= {path.name for path in (tmp_path / "toy").iterdir()}
    tensors = load_file(tmp_path / "toy" / WEIGHTS_NAME)
    assert {key.partition(".")[0] for key in tensors} == set(COMPONENTS)
    card = (tmp_path / "toy" / "README.md").read_text()
    assert f'DiffusionPipeline.from_pretrained("{sdxl_folder}")' in card and PROMPT in card
    assert Image.open(tmp_path / "toy" / "grid.png").size[1] > 2 * 128


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_a_stock_pipeline_with_the_saved_adapter_generates_what_the_trainer_generated(
    sdxl_folder, photographs, tmp_path, method, monkeypatch
):
    generated = {}
    save = StableDiffusionXLPipeline.save_ether_weights

    def save_and_generate(pipe, *args, **kwargs):
        generated["trainer"] = generate(pipe)
        return save(pipe, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionXLPipeline, "save_ether_weights", save_and_generate)
    flags = [*flags_of(sdxl_folder, photographs, tmp_path), "--method", method, "--num_validation_images", "0"]
    dreambooth.main([*flags, "--max_train_steps", "3"])
    fresh = open_sdxl(sdxl_folder)
    base = generate(fresh)
    fresh.load_ether_weights(tmp_path)
    assert np.abs(generate(fresh) - generated["trainer"]).max() <= ONE_GREY_LEVEL
    assert np.abs(base - generated["trainer"]).max() > 4 * ONE_GREY_LEVEL


def test_sdxl_trains_and_generates_in_bfloat16(sdxl_folder, photographs, tmp_path):
    flags = [*flags_of(sdxl_folder, photographs, tmp_path), "--mixed_precision", "bf16", "--max_train_steps", "2"]
    result = dreambooth.main([*flags, "--num_validation_images", "1", "--num_inference_steps", "2"])
    assert np.isfinite(result.losses).all() and (tmp_path / "grid.png").exists()
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS_NAME).values()} == {torch.float32}


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_of_sdxl(sdxl_folder, photographs, tmp_path):
    for processes, batch in ((1, 4), (2, 2)):
        flags = [
            *flags_of(sdxl_folder, photographs, tmp_path / str(processes)),
            "--num_validation_images",
            "0",
            *STEADY,
        ]
        done = launch(
            DREAMBOOTH, *flags, "--max_train_steps", "3", "--train_batch_size", str(batch), processes=processes
        )
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / str(processes) / WEIGHTS_NAME) for processes in (1, 2))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-4)
