"""An adapter for each row of a batch: each row is as it would be alone, whatever the others have."""

import copy

import accelerate
import pytest
import torch
from helpers.lora import ATTENTION, CLIP, UNET, save_adapter
from helpers.pipelines import adapt, assert_unchanged, open_pipeline, snapshot
from helpers.quantized import BACKENDS, layerwise_fp8
from helpers.tiny import make_pipeline
from helpers.zoo import adapt_components, save_control
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from ether_diffusion import EtherFileError
from ether_diffusion.errors import InputError
from ether_diffusion.export.lora import export_lora
from ether_diffusion.serving.rows import AdapterRows

TARGETS = {"unet": UNET, "text_encoder": CLIP}
METHODS = {
    "ether": {"method": "ether"},
    "ether, blocks": {"method": "ether", "num_blocks": 2},
    "ether+": {"method": "ether_plus"},
    "ether+, blocks": {"method": "ether_plus", "num_blocks": 2},
    "ether+, input side": {"method": "ether_plus", "sides": "input"},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
ROWS = 4


def save_lora(folder, base, rank, seed=5):
    """A LoRA by diffusers' own hand, on linear layers and convolutions of both models."""
    pipe = open_pipeline(base)
    torch.manual_seed(seed)
    for component, modules in TARGETS.items():
        config = LoraConfig(r=rank, lora_alpha=3, target_modules=modules, init_lora_weights=False)
        getattr(pipe, component).add_adapter(config, adapter_name="default")
    layers = {
        f"{component}_lora_layers": {
            name.replace(".default", ""): tensor.detach()
            for name, tensor in getattr(pipe, component).state_dict().items()
            if "lora_" in name
        }
        for component in TARGETS
    }
    metadata = {
        f"{component}_lora_adapter_metadata": getattr(pipe, component).peft_config["default"].to_dict()
        for component in TARGETS
    }
    for config in metadata.values():
        config["target_modules"] = sorted(config["target_modules"])
    pipe.save_lora_weights(folder, **layers, **metadata)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_pipeline_folder):
    """Name -> folder of an adapter, one of each kind."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {
        name: save_adapter(folder, tiny_pipeline_folder, name, TARGETS, k, **fields)
        for k, (name, fields) in enumerate(METHODS.items())
    }
    found["attention alone"] = save_adapter(folder, tiny_pipeline_folder, "attention", {"unet": ATTENTION}, 9)
    found["lora"] = save_lora(folder / "lora", tiny_pipeline_folder, 4)
    found["large lora"] = save_lora(folder / "large", tiny_pipeline_folder, 12)
    return found


def sample(rows=ROWS, seed=0, dtype=torch.float32):
    """What a UNet is asked: latents, timesteps, states of the text encoder."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 4, 8, 8, generator=generator).to(dtype)
    states = torch.randn(rows, 16, 16, generator=generator).to(dtype)
    return latents, torch.arange(rows) * 100, states


@torch.no_grad()
def forward(pipe, inputs):
    return pipe.unet(*inputs, return_dict=False)[0]


def bits(tensor):
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def distance(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def alone(pipe, folder, strength, inputs):
    """All rows with one adapter, attached the usual way."""
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        pipe.load_lora_weights(folder, adapter_name="it")
    else:
        pipe.load_ether_weights(folder, "it")
    pipe.set_adapters(["it"], [strength])
    try:
        return forward(pipe, inputs)
    finally:
        pipe.unload_ether_weights()
        pipe.unload_lora_weights()


# Each row is its own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_method_and_strength_is_in_its_row_what_it_is_alone(dtype, tiny_pipeline, adapters):
    pipe = tiny_pipeline.to(dtype)
    inputs = sample(len(adapters) + 1, dtype=dtype)
    strengths = [1.0, 0.5, -1.0, 1.7, 1.0, 0.0, 0.8, 1.0]
    stock = [forward(pipe, inputs)]
    stock += [alone(pipe, folder, s, inputs) for folder, s in zip(adapters.values(), strengths, strict=True)]
    rows = AdapterRows(pipe, max_rows=len(adapters))
    for k, (folder, strength) in enumerate(zip(adapters.values(), strengths, strict=True), start=1):
        rows.assign(k, [(rows.read(folder), strength)])
    with rows.rows("unet", range(len(adapters) + 1)):
        mixed = forward(pipe, inputs)
    for k, (expected, name) in enumerate(zip(stock, ["none", *adapters], strict=True)):
        assert distance(mixed[k], expected[k]) < TOLERANCE[dtype], name
        if dtype == torch.float32 and k and strengths[k - 1]:  # they are far apart, so that none is mistaken
            assert distance(mixed[k], stock[0][k]) > 20 * TOLERANCE[dtype], name


def test_text_encoders_have_rows_too(tiny_pipeline, adapters):
    tokens = torch.randint(3, 90, (3, 16), generator=torch.Generator().manual_seed(0))
    names = ["ether", "ether+", "lora"]
    expected = []
    for k, name in enumerate(names):
        if name == "lora":
            tiny_pipeline.load_lora_weights(adapters[name])
        else:
            tiny_pipeline.load_ether_weights(adapters[name])
        with torch.no_grad():
            expected.append(tiny_pipeline.text_encoder(tokens)[0][k])
        tiny_pipeline.unload_ether_weights()
        tiny_pipeline.unload_lora_weights()
    rows = AdapterRows(tiny_pipeline, max_rows=3)
    for k, name in enumerate(names):
        rows.assign(k + 1, [(rows.read(adapters[name]), 1.0)])
    with rows.rows("text_encoder", [1, 2, 3]), torch.no_grad():
        mixed = tiny_pipeline.text_encoder(tokens)[0]
    assert max(map(distance, mixed, expected)) < 1e-5


@pytest.mark.parametrize("names", [("ether", "ether+"), ("ether+, blocks", "ether"), ("lora", "large lora")])
def test_adapters_of_one_row_act_as_on_a_pipeline(names, tiny_pipeline, adapters):
    inputs, loras = sample(2), "lora" in names[0]
    load = tiny_pipeline.load_lora_weights if loras else tiny_pipeline.load_ether_weights
    for name, short in zip(names, "ab", strict=True):
        load(adapters[name], adapter_name=short)
    tiny_pipeline.set_adapters(["a", "b"], [1.0, 0.6])
    expected = forward(tiny_pipeline, inputs)
    tiny_pipeline.unload_lora_weights() if loras else tiny_pipeline.unload_ether_weights()
    rows = AdapterRows(tiny_pipeline, max_rows=1)
    rows.assign(1, [(rows.read(adapters[names[0]]), 1.0), (rows.read(adapters[names[1]]), 0.6)])
    with rows.rows("unet", [1, 1]):
        assert distance(forward(tiny_pipeline, inputs), expected) < 1e-5


@pytest.fixture(scope="module")
def table(tiny_pipeline_folder, adapters):
    """Rows with every adapter, at two strengths, and one with two adapters."""
    pipe = open_pipeline(tiny_pipeline_folder)
    rows = AdapterRows(pipe, max_rows=2 * len(adapters) + 1)
    read = [rows.read(folder) for folder in adapters.values()]
    for k, adapter in enumerate(read):
        rows.assign(2 * k + 1, [(adapter, 1.0)])
        rows.assign(2 * k + 2, [(adapter, -0.7)])
    rows.assign(2 * len(read) + 1, [(read[0], 1.0), (read[-1], 0.5)])
    return pipe, rows


any_row = st.integers(0, 2 * (len(METHODS) + 3) + 1)
others = st.lists(any_row, min_size=ROWS, max_size=ROWS)
two_seeds = st.tuples(st.integers(0, 9), st.integers(0, 9))


@given(
    own=any_row, place=st.integers(0, ROWS - 1), first=others, second=others, seeds=st.tuples(*[st.integers(0, 9)] * 2)
)
@settings(max_examples=25, deadline=None)
def test_a_row_is_bitwise_the_same_whatever_the_others_have(table, own, place, first, second, seeds):
    pipe, rows = table
    outputs = []
    for indices, seed in zip((first, second), seeds, strict=True):
        indices = [own if k == place else index for k, index in enumerate(indices)]
        inputs = sample(seed=seed)
        for tensor, mine in zip(inputs, sample(seed=100), strict=True):
            tensor[place] = mine[place]
        with rows.rows("unet", indices):
            outputs.append(bits(forward(pipe, inputs)[place]))
    assert torch.equal(*outputs)


@given(indices=others)
@settings(max_examples=15, deadline=None)
def test_row_0_is_bitwise_the_base_beside_any_others(table, indices):
    pipe, rows = table
    base = forward(pipe, sample())
    with rows.rows("unet", indices):
        mixed = forward(pipe, sample())
    for k, index in enumerate(indices):
        assert index or torch.equal(bits(mixed[k]), bits(base[k]))


# Bases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(backend, marks=[] if backend is layerwise_fp8 else pytest.mark.slow, id=backend.__name__)
        for backend in BACKENDS
    ],
)
@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_rows_on_quantised_layers_are_what_an_attached_adapter_makes(backend, method, tiny_tokenizer, tmp_path):
    pipe = make_pipeline(tiny_tokenizer, width=32, text_width=32)
    adapt(pipe, method, num_blocks=2).save_ether_weights(tmp_path)
    pipe.unload_ether_weights()
    backend(pipe.unet)
    latents, times, _ = sample(2)
    inputs = latents, times, torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    base, expected = forward(pipe, inputs), alone(pipe, tmp_path, 0.8, inputs)
    rows = AdapterRows(pipe, max_rows=1)
    rows.assign(1, [(rows.read(tmp_path), 0.8)])
    with rows.rows("unet", [0, 1]):
        mixed = forward(pipe, inputs)
    assert torch.equal(bits(mixed[0]), bits(base[0]))
    assert distance(mixed[1], expected[1]) < max(BACKENDS[backend], 2e-3) < 2 * distance(expected[1], base[1])


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.cpu_offload_with_hook])
def test_rows_on_offloaded_models(offload, tiny_pipeline, adapters):
    inputs = sample(2)
    expected = alone(tiny_pipeline, adapters["ether+"], 1.0, inputs)
    offload(tiny_pipeline.unet, execution_device=torch.device("cpu"))
    base = forward(tiny_pipeline, inputs)
    rows = AdapterRows(tiny_pipeline, max_rows=1)
    # Convolutions whose weight is elsewhere cannot be asked for it; linear layers can.
    name = "attention alone" if offload is accelerate.cpu_offload else "ether+"
    rows.assign(1, [(rows.read(adapters[name]), 1.0)])
    with rows.rows("unet", [0, 1]):
        mixed = forward(tiny_pipeline, inputs)
    assert torch.equal(bits(mixed[0]), bits(base[0]))
    if name == "ether+":
        assert distance(mixed[1], expected[1]) < 1e-5


@pytest.mark.parametrize("to", ["kohya", "diffusers-lora", "peft-lora"])
def test_lora_files_of_every_format_are_read(to, tiny_pipeline, tmp_path):
    adapt_components(tiny_pipeline, "unet", method="ether_plus")
    tiny_pipeline.save_ether_weights(tmp_path / "ether")
    export_lora(tiny_pipeline, tmp_path / "lora", to=to)
    tiny_pipeline.unload_ether_weights()
    rows = AdapterRows(tiny_pipeline, max_rows=1)
    made = rows.read(tmp_path / "ether").factors["unet"]
    read = rows.read(tmp_path / "lora" / "unet" if to == "peft-lora" else tmp_path / "lora").factors["unet"]
    assert made.keys() == read.keys()
    for path, (down, up) in read.items():
        assert distance(down @ up, made[path][0] @ made[path][1]) < 1e-5


def test_closing_leaves_the_pipeline_bit_for_bit_as_it_was(tiny_pipeline, adapters):
    inputs = sample()
    before, base = snapshot(tiny_pipeline), forward(tiny_pipeline, inputs)
    rows = AdapterRows(tiny_pipeline, max_rows=2)
    rows.assign(1, [(rows.read(adapters["ether"]), 1.0)])
    with rows.rows("unet", [1] * ROWS):
        assert not torch.equal(forward(tiny_pipeline, inputs), base)
    assert torch.equal(forward(tiny_pipeline, inputs), base)
    rows.close()
    rows.close()
    assert_unchanged(tiny_pipeline, before)
    assert not any(module._forward_hooks for module in tiny_pipeline.unet.modules())
    assert torch.equal(forward(tiny_pipeline, inputs), base)
    with pytest.raises(InputError, match="were closed"):
        rows.read(adapters["ether"])


def test_a_row_is_what_it_was_assigned_last(tiny_pipeline, adapters):
    inputs = sample(2)
    rows = AdapterRows(tiny_pipeline, max_rows=2)
    read = {name: rows.read(adapters[name]) for name in ("ether", "large lora")}
    outputs = []
    for name in ("ether", "large lora", "ether"):
        rows.assign(1, [(read[name], 1.0)])
        with rows.rows("unet", [1, 0]):
            outputs.append(forward(tiny_pipeline, inputs))
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    rows.assign(1, [])
    with rows.rows("unet", [1, 0]):
        assert torch.equal(forward(tiny_pipeline, inputs), forward(tiny_pipeline, inputs))
    rows.clear(1)
    with pytest.raises(InputError, match="row 1 holds no adapters"), rows.rows("unet", [1, 0]):
        pass


# What is refused --------------------------------------------------------------------------------------------------


def test_wrong_rows_components_strengths_and_batches_are_refused(tiny_pipeline, adapters):
    rows = AdapterRows(tiny_pipeline, max_rows=2)
    read = rows.read(adapters["ether"])
    for row in (0, 3, True, "1"):
        with pytest.raises(InputError, match="1 to 2 fit"):
            rows.assign(row, [(read, 1.0)])
    with pytest.raises(InputError, match="strength nan"):
        rows.assign(1, [(read, float("nan"))])
    rows.assign(1, [(read, 1.0)])
    with pytest.raises(InputError, match="this pipeline has vae, text_encoder, unet"), rows.rows("transformer", [1]):
        pass
    with rows.rows("unet", [1, 1]), pytest.raises(InputError, match=r"a batch of 3, but .* for 2 rows"):
        forward(tiny_pipeline, sample(3))
    with pytest.raises(InputError, match="max_rows=0"):
        AdapterRows(tiny_pipeline, max_rows=0)


def test_pipelines_with_adapters_or_compiled_models_are_refused(tiny_pipeline, adapters):
    tiny_pipeline.load_ether_weights(adapters["ether"])
    with pytest.raises(InputError, match="text_encoder has adapters attached"):
        AdapterRows(tiny_pipeline, max_rows=1)
    tiny_pipeline.fuse_ether()
    with pytest.raises(InputError, match="text_encoder has adapters attached or fused"):
        AdapterRows(tiny_pipeline, max_rows=1)
    tiny_pipeline.unload_ether_weights()
    tiny_pipeline.unet.compile()
    with pytest.raises(InputError, match="unet is compiled"):
        AdapterRows(tiny_pipeline, max_rows=1)


def test_files_that_no_row_can_have_are_refused(tiny_pipeline, tiny_pipeline_folder, wider_pipeline_folder, tmp_path):
    rows = AdapterRows(tiny_pipeline, max_rows=1)
    save_control("light", tiny_pipeline_folder, tmp_path / "control")
    save_control("controlnet", tiny_pipeline_folder, tmp_path / "modules")
    save_adapter(tmp_path, wider_pipeline_folder, "wide", TARGETS, 1)
    save_lora(tmp_path / "wide lora", wider_pipeline_folder, 4)
    (tmp_path / "broken.safetensors").write_bytes(b"no adapter")
    for name, message in {
        "control": "a control encoder, which no single row",
        "modules": "replaced modules of controlnet",
        "wide": "made for another architecture",
        "wide lora": "but the layer here needs",
        "broken.safetensors": "not a whole safetensors file",
    }.items():
        with pytest.raises(EtherFileError, match=message):
            rows.read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        rows.read(tmp_path / "nowhere")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_loras_that_are_more_than_plain_factors_are_refused(options, tiny_pipeline, tmp_path):
    config = LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False, **options)
    get_peft_model(copy.deepcopy(tiny_pipeline.unet), config).save_pretrained(tmp_path)
    rows = AdapterRows(tiny_pipeline, max_rows=1)
    with pytest.raises(EtherFileError, match="more than plain LoRA"):
        rows.read(tmp_path)


def test_a_lora_with_a_broken_config_or_factor_is_refused(tiny_pipeline, adapters, tmp_path):
    rows = AdapterRows(tiny_pipeline, max_rows=1)
    tensors = load_file(adapters["lora"] / "pytorch_lora_weights.safetensors")
    first = next(name for name in tensors if "lora_A" in name)
    cases = {
        "is not JSON": (tensors, {"lora_adapter_metadata": "{"}),
        "has one factor of two": ({k: v for k, v in tensors.items() if k != first}, None),
        "not made of finite": (tensors | {first: tensors[first] * float("nan")}, None),
        "is for no component": (tensors | {f"decoder.{first}": tensors[first].clone()}, None),
    }
    for message, (broken, metadata) in cases.items():
        save_file(broken, tmp_path / "broken.safetensors", metadata)
        with pytest.raises(EtherFileError, match=message):
            rows.read(tmp_path / "broken.safetensors")
