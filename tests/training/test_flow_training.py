"""Training of transformers with flow matching, from the script's command line to a stock pipeline."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from helpers.flow_runs import IMAGES, QUICK
from helpers.flow_zoo import PIPELINES, SIDES, SIZED
from helpers.pipelines import ONE_GREY_LEVEL
from helpers.scripts import DREAMBOOTH, launch, refusal, same, tensors
from PIL import Image
from safetensors.torch import load_file, save_file

from ether_diffusion.adapters.schema import WEIGHTS_NAME
from ether_diffusion.training.families import ModelSource, family_at
from ether_diffusion.training.families.flow import FlowFamily
from ether_diffusion.training.options import ValidationOptions
from ether_diffusion.training.preview import Preview

ENCODERS_TO_TRAIN = [name for name in PIPELINES if name in ("flux", "kontext", "sd3")]
MOST_USED = ("flux", "klein", "sd3", "qwen", "z_image")
"""On which everything is tried in the quick run."""


@pytest.fixture(params=list(PIPELINES))
def name(request) -> str:
    return request.param


@pytest.fixture(
    params=[each if each in MOST_USED else pytest.param(each, marks=pytest.mark.slow) for each in PIPELINES]
)
def each(request) -> str:
    """The name of a pipeline, of which the most used ones are in the quick run."""
    return request.param


def inputs_of(name: str) -> dict[str, object]:
    """What a stock pipeline is called with."""
    side = SIDES.get(name, 16)
    size = {"height": side, "width": side, **SIZED.get(name, {})} | ({"max_area": 256} if name == "kontext" else {})
    if name == "qwen":
        size["negative_prompt"] = " "  # without which it has no guidance
    return {"prompt": "a dog", "num_inference_steps": 2, **size}


def painted(pipe: DiffusionPipeline, name: str) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipe(generator=generator, output_type="np", **inputs_of(name)).images[0]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


def index_of(pipe: DiffusionPipeline) -> dict[str, tuple]:
    """What the pipeline would write of its components."""
    return {name: tuple(entry) for name, entry in pipe.config.items() if isinstance(entry, list | tuple)}


def test_two_steps_learn_and_the_result_loads_in_a_stock_pipeline(name, flow_bases, on, train):
    base = flow_bases(name)
    result, folder = train(*on(name), *QUICK, *IMAGES, "--validation_steps", 1)
    assert len(result.losses) == 2 and all(np.isfinite(result.losses))
    assert {path.name for path in folder.rglob("*.png")} == {"grid.png", "step-000001.png"}
    stock, plain = (DiffusionPipeline.from_pretrained(base) for _ in range(2))
    stock.load_ether_weights(folder)
    plain.transformer.requires_grad_(False)  # as an adapter leaves it: PyTorch may round otherwise
    before, after = painted(plain, name), painted(stock, name)
    assert np.abs(after - before).max() > ONE_GREY_LEVEL
    stock.unload_ether_weights()
    assert np.array_equal(painted(stock, name), before)


def test_sample_images_are_those_of_the_stock_pipeline_before_and_after(each, flow_bases, on, train):
    """They are made of kept prompts without text encoders in memory; a stock pipeline makes the same of text."""
    source, options = (
        ModelSource(str(flow_bases(each))),
        ValidationOptions(num_validation_images=1, num_inference_steps=2),
    )
    adapted = train(*on(each), *QUICK)[1]
    family = family_at(source).load(source, torch.float32)
    preview = Preview(family, ["a dog"], options, seed=3, target=(SIDES.get(each, 16),) * 2)
    family.pipe.load_ether_weights(adapted)
    parts = index_of(family.pipe)
    grid = preview.compare()
    assert index_of(family.pipe) == parts  # what was away meanwhile is saved with the pipeline again
    stock = DiffusionPipeline.from_pretrained(source.path)
    assert grid.height > 32 and pixels(preview.base[0][0]) == pytest.approx(painted(stock, each), abs=ONE_GREY_LEVEL)
    stock.load_ether_weights(adapted)
    tuned = preview._generate(family.pipe)[0][0]
    assert pixels(tuned) == pytest.approx(painted(stock, each), abs=ONE_GREY_LEVEL)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(each, on, train):
    base = (*on(each), "--train_batch_size", 2)
    base += ("--checkpointing_steps", 1)
    whole = train(*base, "--max_train_steps", 4, "--caption_dropout", 0.5, output="whole")[1]
    half = train(
        *base,
        "--max_train_steps",
        2,
        "--caption_dropout",
        0.5,
        output="half",
    )[1]
    flags = ("--max_train_steps", 4, "--caption_dropout", 0.5, "--resume_from_checkpoint", "latest")
    train(*base, *flags, output="half")
    assert same(whole, half)


@pytest.mark.parametrize(
    "flags",
    [
        ("--cache_latents", "--center_crop"),
        ("--gradient_checkpointing",),
        ("--pre_compute_text_embeddings",),
        ("--offload",),
        ("--vae_tiling",),
    ],
    ids=lambda flags: flags[0],
)
def test_what_saves_memory_changes_nothing_that_is_learned(each, on, train, flags):
    base = (*on(each), *QUICK)
    kept = [flag for flag in flags if flag == "--center_crop"]
    usual, changed = train(*base, *kept, output="usual")[1], train(*base, *flags, output="changed")[1]
    for key, value in tensors(usual).items():
        torch.testing.assert_close(tensors(changed)[key], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantised_base_is_trained_and_the_adapter_loads_on_the_base_as_it_is(each, kind, flow_bases, on, train):
    base = flow_bases(each)
    if kind == "int8":
        pytest.importorskip("torchao")
    flags = (*on(each), *QUICK, "--mixed_precision", "bf16")
    folder = train(*flags, "--quantize", kind, output=kind)[1]
    plain = train(*flags, output="plain")[1]
    assert not same(folder, plain)
    stock = DiffusionPipeline.from_pretrained(base)
    stock.load_ether_weights(folder)
    assert np.isfinite(painted(stock, each)).all()


@pytest.mark.parametrize("name", ENCODERS_TO_TRAIN)
def test_text_encoders_that_can_be_trained_are(name, flow_bases, on, train):
    base = flow_bases(name)
    folder = train(*on(name), *QUICK, *IMAGES, "--train_text_encoder")[1]
    family = family_at(ModelSource(str(base)))
    components = {key.split(".")[0] for key in load_file(folder / WEIGHTS_NAME)}
    assert components == {"transformer", *family.trained_text_encoders}
    stock = DiffusionPipeline.from_pretrained(base)
    before = painted(stock, name)
    stock.load_ether_weights(folder)
    assert np.abs(painted(stock, name) - before).max() > ONE_GREY_LEVEL


@pytest.mark.parametrize("method", ["ether", "lora", "oft", "full"])
def test_other_methods_train_and_load(method, flow_bases, on, train):
    base = flow_bases("flux")
    _, folder = train(*on("flux"), *QUICK, "--method", method)
    assert any(folder.rglob("*.safetensors"))
    if method == "full":
        assert np.isfinite(painted(DiffusionPipeline.from_pretrained(folder), "flux")).all()
    if method == "lora":
        stock = DiffusionPipeline.from_pretrained(base)
        stock.load_lora_weights(folder)
        (saved,) = map(load_file, folder.glob("*.safetensors"))
        loaded = [key for key, _ in stock.transformer.named_parameters() if ".lora_A." in key]
        assert len(loaded) == sum(".lora_A." in key for key in saved) == len(saved) / 2


@pytest.mark.parametrize(
    ("flags", "differs"),
    [
        (("--timestep_sampling", "uniform"), True),
        (("--timestep_sampling", "logit_normal"), False),
        (("--timestep_shift", "5"), True),
        (("--timestep_shift", "auto"), False),
        (("--guidance_embedding", "3.5"), True),
        (("--guidance_embedding", "1"), False),
        (("--caption_dropout", "1"), True),
        (("--target_modules", "attention"), False),
        (("--target_modules", "all-linear"), True),
        (("--target_modules", r".*\.single_.*to_q|transformer_blocks\.0\.attn\.to_q"), True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_every_flag_of_flow_matching_does_something(flags, differs, on, train):
    base = (*on("flux"), *QUICK)
    usual, changed = train(*base, output="usual")[1], train(*base, *flags, output="changed")[1]
    assert same(usual, changed) != differs


def test_dropped_captions_are_those_of_a_run_on_the_empty_prompt(on, train):
    base = (*on("qwen"), *QUICK)
    folders = [train(*base, "--instance_prompt", x, "--caption_dropout", 1, output=x)[1] for x in ("x", "y")]
    assert same(*folders) and not same(folders[0], train(*base, "--instance_prompt", "x", output="z")[1])


def test_class_images_are_generated_at_the_size_of_the_training(on, train, tmp_path):
    flags = ("--with_prior_preservation", "--class_prompt", "a toy", "--num_class_images", 2)
    result, _ = train(*on("klein"), *QUICK, *flags, "--class_data_dir", tmp_path / "class")
    sizes = {Image.open(path).size for path in (tmp_path / "class").glob("*.png")}
    assert sizes == {(16, 16)} and len(result.losses) == 2


@pytest.mark.parametrize(
    ("base", "flags", "message"),
    [
        ("flux", "--snr_gamma 5", "--snr_gamma: got 5.0, has no meaning for FluxPipeline"),
        (None, "--timestep_sampling uniform", "--timestep_sampling: has no effect on StableDiffusionPipeline"),
        (None, "--timestep_shift 3", "--timestep_shift: has no effect on StableDiffusionPipeline"),
        (None, "--guidance_embedding 3", "--guidance_embedding: has no effect on StableDiffusionPipeline"),
        ("flux", "--timestep_shift -1", "--timestep_shift: got '-1', needs \"auto\" or a number above 0"),
        ("sd3", "--guidance_embedding 3", "--guidance_embedding: has no effect, this StableDiffusion3Pipeline has no"),
        ("sd3", "--resolution 512", "--resolution: got 512, the model takes sides of up to 32 pixels"),
        ("flux", "--target_modules attention to_q", "--target_modules attention to_q: attention stands alone"),
        ("qwen", "--train_text_encoder", "--train_text_encoder: QwenImagePipeline has a language model"),
        ("klein", "--quantize nf4", "--quantize nf4: "),
        ("flux", "--quantize fp8 --method full", "--quantize fp8: needs weights that stay frozen"),
        ("flux", "--target_modules (", "--target_modules (: is no regular expression"),
        ("flux", "--target_modules to_q.*", "transformer: no layer's whole name matches 'to_q.*'"),
        ("flux", "--resolution 18", "--resolution: got 18, needs a multiple of 4"),
    ],
)
def test_flags_without_a_meaning_are_refused_in_one_sentence(
    base, flags, message, flow_bases, train, capsys, tmp_path
):
    given = ("--pretrained_model_name_or_path", flow_bases(base)) if base else ()
    size = () if "--resolution" in flags else ("--resolution", 16)
    assert message in refusal(capsys, train, *given, *size, *flags.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("transformer", "its transformer lacks weights that its config asks for: "),
        ("text_encoder_2", "its text_encoder_2 lacks weights that its config asks for: "),
        ("vae", "its vae lacks weights that its config asks for: "),
        ("tokenizer", "its tokenizer is missing or has no vocabulary"),
        ("tokenizer_2", "its tokenizer_2 is missing or has no vocabulary"),
    ],
)
def test_a_base_that_lacks_a_part_is_told_in_one_sentence(damage, message, flow_bases, train, capsys, tmp_path):
    base = shutil.copytree(flow_bases("flux"), tmp_path / "base")
    if damage.startswith("tokenizer"):
        shutil.rmtree(base / damage)
    else:
        (file,) = (base / damage).glob("*.safetensors")
        tensors = load_file(file)
        del tensors[next(key for key in sorted(tensors) if key.endswith("weight") and tensors[key].ndim > 1)]
        save_file(tensors, file, {"format": "pt"})
    flags = ("--pretrained_model_name_or_path", base, "--resolution", 16, *QUICK)
    with pytest.raises(SystemExit) as stop:
        train(*flags)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and message in told


def test_text_encoders_go_before_the_transformer_comes(each, on, train, monkeypatch, tmp_path):
    """At every moment at which weights are read: what is in memory then, for training, class and sample images."""
    seen, component = [], FlowFamily.component

    def watch(self, name):
        found = component(self, name)
        if self._skeletons:  # before that, the pipeline has no weights at all
            seen.append(set(self.modules()))
        return found

    monkeypatch.setattr(FlowFamily, "component", watch)
    prior = ("--with_prior_preservation", "--class_prompt", "toy", "--num_class_images", 1)
    train(*on(each), *QUICK, *IMAGES, *prior, "--class_data_dir", tmp_path / "class")
    encoders = {name for names in seen for name in names if name.startswith("text_encoder")}
    assert encoders and any("transformer" in names for names in seen)
    assert not any("transformer" in names and names & encoders for names in seen)


def test_class_images_are_generated_by_the_base_as_it_is_trained(on, train, monkeypatch, tmp_path):
    loaded, load = [], FlowFamily.load.__func__

    def watch(cls, source, dtype, quantize=None):
        loaded.append(quantize)
        return load(cls, source, dtype, quantize)

    monkeypatch.setattr(FlowFamily, "load", classmethod(watch))
    prior = ("--with_prior_preservation", "--class_prompt", "toy", "--num_class_images", 1)
    flags = (*prior, "--class_data_dir", tmp_path / "class", "--quantize", "fp8", "--mixed_precision", "bf16")
    train(*on("klein"), *QUICK, *flags)
    assert loaded == ["fp8", "fp8"]


def test_defaults_that_are_named_go_on_from_a_run_that_did_not_name_them(on, train):
    train(*on("sd3"), "--max_train_steps", 1, "--checkpointing_steps", 1)
    named = ("--timestep_shift", "auto", "--timestep_sampling", "logit_normal", "--resume_from_checkpoint", "latest")
    result, _ = train(*on("sd3"), "--max_train_steps", 2, "--checkpointing_steps", 1, *named)
    assert len(result.losses) == 2


LOADING = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
import ether_diffusion
for line in sys.stdin.read().splitlines():
    base, adapter, image, inputs = line.split("\t")
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_ether_weights(adapter)
    numpy.save(image, pipe(generator=torch.Generator().manual_seed(3), output_type="np", **eval(inputs)).images[0])
"""


def test_the_adapters_of_all_families_generate_the_same_in_a_new_process(flow_bases, on, train, tmp_path):
    lines, here = [], {}
    for name in PIPELINES:
        folder = train(*on(name), *QUICK, output=name)[1]
        pipe = DiffusionPipeline.from_pretrained(flow_bases(name))
        pipe.load_ether_weights(folder)
        here[name] = painted(pipe, name)
        lines.append("\t".join(map(str, (flow_bases(name), folder, tmp_path / f"{name}.npy", inputs_of(name)))))
    command = [sys.executable, "-c", LOADING]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    there = subprocess.run(command, input="\n".join(lines), text=True, capture_output=True, env=environment)
    assert there.returncode == 0, there.stderr
    for name, image in here.items():
        assert np.abs(np.load(tmp_path / f"{name}.npy") - image).max() <= ONE_GREY_LEVEL


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        MemoryError("no room"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: no room"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_images_for_which_the_memory_is_not_enough_are_left_out_with_a_warning(error, on, train, monkeypatch, caplog):
    def refuse(self, *args, **options):
        raise error

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", refuse)
    result, folder = train(*on("sd3"), *QUICK, *IMAGES)
    assert len(result.losses) == 2 and (folder / WEIGHTS_NAME).is_file() and not (folder / "grid.png").exists()
    assert "no sample images: the memory is not enough (" in caplog.text and "no room)" in caplog.text


@pytest.mark.slow
def test_the_script_trains_a_transformer_in_two_processes_as_in_one(on, photographs, tmp_path):
    common = [*on("klein"), "--instance_data_dir", photographs]
    common += ["--instance_prompt", "a photo of sks toy", "--max_train_steps", 2]
    common += ["--num_validation_images", 0, "--adam_epsilon", "1e-3"]
    one = launch(DREAMBOOTH, *common, "--train_batch_size", 4, "--output_dir", tmp_path / "one")
    two = launch(DREAMBOOTH, *common, "--train_batch_size", 2, "--output_dir", tmp_path / "two", processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for key, value in tensors(tmp_path / "one").items():
        torch.testing.assert_close(tensors(tmp_path / "two")[key], value, atol=1e-5, rtol=1e-4)
