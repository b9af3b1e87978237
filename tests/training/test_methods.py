"""Every method of training: what is trained, what is saved, and that the stock way of loading generates the same."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from helpers.methods import denoise, options_of, perturb, reopen, start
from helpers.pipelines import ONE_GREY_LEVEL, generate, open_pipeline
from helpers.zoo import quiet, sdxl
from peft.tuners.boft import layer as boft_layer

from ether_diffusion.errors import InputError
from ether_diffusion.training.families import ModelSource, StableDiffusion, StableDiffusionXL
from ether_diffusion.training.methods.configs import configs_of, read_method
from ether_diffusion.training.methods.injection import add_adapters, dry_run, trained_parameters
from ether_diffusion.training.methods.saving import load_trained, save_trained
from ether_diffusion.training.options import LEARNING_RATES, METHODS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WITH_TEXT = pytest.mark.parametrize("with_text", [False, True], ids=["unet", "unet+text_encoder"])


@pytest.fixture(autouse=True)
def without_cuda_compiler(monkeypatch):
    """PEFT tries to compile BOFT's CUDA kernel also when it loads."""
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: None)


@pytest.fixture(scope="module")
def sdxl_folder(tiny_pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sdxl"
    sdxl(open_pipeline(tiny_pipeline_folder)).save_pretrained(folder)
    return folder


@pytest.fixture
def parts(opened):
    """Copies of the components that are trained: quicker to have than a pipeline."""
    return SimpleNamespace(unet=copy.deepcopy(opened.unet), text_encoder=copy.deepcopy(opened.text_encoder))


@WITH_TEXT
@pytest.mark.parametrize("name", METHODS)
def test_what_was_trained_loads_the_stock_way_and_generates_the_same(
    name, with_text, tiny_pipeline, tiny_pipeline_folder, base_image, tmp_path
):
    method, configs, models = start(tiny_pipeline, options_of(name, with_text))
    perturb(models, configs, size=0.01 if name == "full" else 0.3)
    tuned = generate(tiny_pipeline)
    assert np.abs(tuned - base_image).max() > 4 * ONE_GREY_LEVEL
    save_trained(tiny_pipeline, configs, tmp_path / "result", method=method, metadata={"prompt": "sks"})
    assert not list((tmp_path / "result").glob(".*"))
    loaded = generate(reopen(tiny_pipeline_folder, tmp_path / "result", method, list(configs)))
    assert np.abs(loaded - tuned).max() <= ONE_GREY_LEVEL


@pytest.mark.parametrize("name", ["ether", "lora", "full"])
def test_sdxl_with_both_text_encoders_loads_the_stock_way(name, sdxl_folder, tmp_path):
    pipe = quiet(DiffusionPipeline.from_pretrained(sdxl_folder))
    base = generate(pipe)
    method, configs, models = start(pipe, options_of(name, True), StableDiffusionXL)
    assert list(configs) == ["unet", "text_encoder", "text_encoder_2"]
    assert dry_run(StableDiffusionXL.read_blueprint(ModelSource(str(sdxl_folder))).models, configs) == sum(
        p.numel() for p in trained_parameters(models, configs)
    )
    perturb(models, configs, size=0.01 if name == "full" else 0.3)
    tuned = generate(pipe)
    assert np.abs(tuned - base).max() > 2 * ONE_GREY_LEVEL
    save_trained(pipe, configs, tmp_path, method=method, metadata={})
    loaded = generate(reopen(sdxl_folder, tmp_path, method, list(configs)))
    assert np.abs(loaded - tuned).max() <= ONE_GREY_LEVEL


@pytest.mark.parametrize("name", METHODS)
def test_the_dry_run_counts_what_is_trained_in_every_component(name, parts, blueprint):
    _, configs, models = start(parts, options_of(name, True))
    for component, config in configs.items():
        trained = trained_parameters(models, {component: config})
        assert dry_run(blueprint.models, {component: config}) == sum(each.numel() for each in trained) > 0
    assert all(parameter.is_meta for parameter in trained_parameters(blueprint.models, configs))


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_number_gets_a_gradient(name, parts):
    _, configs, models = start(parts, options_of(name))
    # At the start one factor of LoRA is zero, and so is the other's gradient: a step away, all of them have one.
    perturb(models, configs)
    denoise(parts.unet).square().mean().backward()
    names = {parameter: key for key, parameter in parts.unet.named_parameters()}
    without = [names[each] for each in trained_parameters(models, configs) if each.grad is None or not each.grad.any()]
    assert not without
    if name != "full":
        assert all(parameter.grad is None for parameter in names if not parameter.requires_grad)


@pytest.mark.parametrize("name", METHODS)
def test_a_training_lowers_the_loss(name, parts):
    _, configs, models = start(parts, options_of(name))
    optimizer = torch.optim.AdamW(trained_parameters(models, configs), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = (denoise(parts.unet) - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in METHODS), ("lora", torch.float16), ("vera", torch.float16)],
)
def test_what_is_trained_is_float32_over_a_base_of_half_precision(name, dtype, parts):
    for model in vars(parts).values():
        model.to(dtype)
    _, configs, models = start(parts, options_of(name, True))
    assert {parameter.dtype for parameter in trained_parameters(models, configs)} == {torch.float32}
    if name == "full":
        return
    frozen = {p.dtype for model in models.values() for p in model.parameters() if not p.requires_grad}
    assert frozen == {dtype}
    perturb(models, configs)
    answer = denoise(parts.unet, dtype)
    answer.float().square().mean().backward()
    assert answer.dtype == dtype and torch.isfinite(answer).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trained_parameters(models, {"unet": None}))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_the_start_follows_from_the_seed_alone_and_leaves_the_global_state(name, opened):
    starts = []
    for seed, noise in ((1, 0), (1, 1), (2, 1)):
        torch.manual_seed(noise)
        models = {"unet": copy.deepcopy(opened.unet)}
        options = options_of(name)
        configs = configs_of(read_method(options), StableDiffusion, options)
        state = torch.get_rng_state()
        add_adapters(models, configs, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        starts.append(torch.cat([p.detach().flatten() for p in trained_parameters(models, configs)]))
    assert torch.equal(starts[0], starts[1])
    if name in ("ether", "lora", "hra"):  # the others start at the same place whatever the seed
        assert not torch.equal(starts[0], starts[2])


def test_vera_trains_its_scales_alone_and_its_layers_share_one_pair_of_matrices(parts):
    _, configs, models = start(parts, options_of("vera"))
    unet = models["unet"]
    trained = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert trained and all("vera_lambda_" in name for name in trained)
    layers = [module for module in unet.modules() if hasattr(module, "vera_lambda_b")]
    assert len({id(layer.vera_A) for layer in layers}) == 1


def test_oft_takes_the_largest_block_that_divides_every_width(parts, wider_pipeline_folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*oft_block_size")
        start(parts, options_of("oft"))
        wider = StableDiffusionPipeline.from_pretrained(wider_pipeline_folder)
        start(wider, options_of("oft"))
    assert parts.unet.peft_config["default"].oft_block_size == 16
    assert wider.unet.peft_config["default"].oft_block_size == 8  # of widths 24 and 16


def test_oft_without_a_common_block_names_the_widths():
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(9, 4), "to_v": torch.nn.Linear(8, 4)})
    options = options_of("oft", target_modules=("to_q", "to_v"))
    configs = configs_of(read_method(options), StableDiffusion, options)
    with pytest.raises(InputError, match=r"unet: no block size from 2 to 32 divides all widths \(8, 9\)"):
        add_adapters({"unet": model}, configs, seed=0)


def test_boft_never_asks_for_a_compiler(parts, monkeypatch):
    def compile_kernel():
        raise AssertionError("PEFT was asked to compile")

    monkeypatch.setattr(boft_layer, "get_fbd_cuda", compile_kernel)
    start(parts, options_of("boft"))
    assert boft_layer.get_fbd_cuda is compile_kernel


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_title_and_a_default_learning_rate(name):
    method = read_method(options_of(name))
    assert (method.name, method.learning_rate) == (name, LEARNING_RATES[name])
    assert method.title and (method.paper is None) == (name == "full")


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_misspelt_target_is_an_error_for_every_method(name, component, blueprint):
    field = "target_modules" if component == "unet" else "text_encoder_target_modules"
    options = options_of(name, True, **{field: ("to_q" if component == "unet" else "q_proj", "no_proj")})
    configs = configs_of(read_method(options), StableDiffusion, options)
    with pytest.raises(InputError, match=f"{component}: no layer is called 'no_proj'"):
        dry_run(blueprint.models, configs)


@pytest.mark.parametrize("name", ["ether", "lora", "hra", "full"])
def test_saving_again_replaces_what_was_there_and_keeps_the_rest(name, tiny_pipeline, tiny_pipeline_folder, tmp_path):
    (tmp_path / "README.md").write_text("a card")
    method, configs, models = start(tiny_pipeline, options_of(name))
    for _ in range(2):
        perturb(models, configs, size=0.01 if name == "full" else 0.3)
        save_trained(tiny_pipeline, configs, tmp_path, method=method, metadata={})
    loaded = generate(quiet(load_trained(tiny_pipeline_folder, tmp_path)))
    assert np.abs(loaded - generate(tiny_pipeline)).max() <= ONE_GREY_LEVEL
    assert (tmp_path / "README.md").read_text() == "a card" and not list(tmp_path.glob(".*"))


def test_a_folder_without_weights_of_a_training_is_named(tiny_pipeline, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: holds no weights of a training"):
        load_trained(tiny_pipeline, tmp_path)


@pytest.mark.parametrize("name", ["lora", "hra"])
def test_files_carry_the_metadata_and_no_place_on_this_machine(name, tiny_pipeline, tiny_pipeline_folder, tmp_path):
    method, configs, _ = start(tiny_pipeline, options_of(name, True))
    save_trained(tiny_pipeline, configs, tmp_path, method=method, metadata={"prompt": "a photo of sks"})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    assert b"a photo of sks" in content and str(tiny_pipeline_folder).encode() not in content
