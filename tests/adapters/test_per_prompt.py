"""`pipe.ether_adapters_per_prompt`: each prompt of a call has its own adapter, as if it were called alone."""

import numpy as np
import pytest
import torch
from helpers import flow_zoo, zoo
from helpers.lora import ATTENTION
from helpers.pipelines import adapt, assert_unchanged, snapshot
from helpers.zoo import adapt_components
from peft import LoraConfig

from ether_diffusion import EtherControlPipeline

PROMPTS = ["a dog", "a cat", "a cow"]  # of one length: pipelines that pad mix what they pad
ENTRIES = ["dog", None, ("cat", 0.6)]
SAME = 1e-5


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def one_by_one(pipe, images, **options):
    """Each prompt in a call of its own, with its adapter set the usual way."""
    made, seeds = [], generators(len(PROMPTS) * images)
    negative = options.pop("negative_prompt", None)
    for k, (prompt, entry) in enumerate(zip(PROMPTS, ENTRIES, strict=True)):
        options |= {} if negative is None else {"negative_prompt": negative[k : k + 1]}
        if entry is None:
            pipe.disable_ether()
        else:
            pipe.enable_ether()
            name, strength = (entry, 1.0) if isinstance(entry, str) else entry
            pipe.set_adapters([name], [strength])
        for seed in seeds[k * images : (k + 1) * images]:
            made.append(pipe(prompt=[prompt], generator=seed, output_type="np", **options).images[0])
    pipe.enable_ether()
    return np.array(made)


def together(pipe, images, **options):
    with pipe.ether_adapters_per_prompt(ENTRIES):
        return mixed(pipe, images, **options)


def mixed(pipe, images, **options):
    seeds = generators(len(PROMPTS) * images)
    return pipe(prompt=PROMPTS, num_images_per_prompt=images, generator=seeds, output_type="np", **options).images


def assert_own(pipe, images=2, **options):
    options = {"num_inference_steps": 2} | options
    expected = one_by_one(pipe, images, **options)
    found = together(pipe, images, **options)
    assert np.abs(found - expected).max() < SAME
    assert np.abs(mixed(pipe, images, **options) - expected).max() > 10 * SAME  # the last adapter for all


def adapt_all(pipe, *components):
    for k, name in enumerate(("dog", "cat")):
        adapt_components(pipe, *components, name=name, seed=k + 1, method=("ether", "ether_plus")[k])
    return pipe


def with_two(pipe):
    adapt(pipe, "ether", 1, "dog", num_blocks=2)
    return adapt(pipe, "ether_plus", 2, "cat")


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_each_prompt_has_its_own_adapter(tiny_pipeline, images, guidance):
    assert_own(with_two(tiny_pipeline), images, guidance_scale=guidance)


def test_negative_prompts_are_encoded_with_the_adapter_of_their_prompt(tiny_pipeline):
    assert_own(with_two(tiny_pipeline), guidance_scale=5.0, negative_prompt=["grey", "dark", "flat"])


def test_convolutions_have_adapters_by_row(tiny_pipeline):
    for k, name in enumerate(("dog", "cat")):
        fields = {"method": ("ether", "ether_plus")[k], "target_modules": ["conv1", "proj_in"]}
        adapt_components(tiny_pipeline, "unet", name=name, seed=k, **fields)
    assert_own(tiny_pipeline)


def test_models_in_bfloat16(tiny_pipeline):
    pipe = with_two(tiny_pipeline.to(torch.bfloat16))
    options = {"num_inference_steps": 2}
    assert np.abs(together(pipe, 1, **options) - one_by_one(pipe, 1, **options)).max() < 0.05


def test_sdxl_has_them_on_both_text_encoders(tiny_pipeline):
    pipe = zoo.sdxl(tiny_pipeline)
    assert_own(adapt_all(pipe, "unet", "text_encoder", "text_encoder_2"), height=16, width=16)


def test_controlnets_have_them(tiny_pipeline):
    pipe = zoo.controlnet(tiny_pipeline)
    adapt_all(pipe, "unet", "controlnet")
    images = {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    assert_own(pipe, 1, **images)


FLOW = {
    "flux": {"true_cfg_scale": 2.0, "negative_prompt": ["grey 1", "grey 2", "grey 3"]},  # guidance in two calls
    "sd3": {},
    "qwen": {"true_cfg_scale": 2.0, "negative_prompt": ["grey 1", "grey 2", "grey 3"]},
    "z_image": {"guidance_scale": 3.0},  # lists of samples
    "krea2": {},  # tokens as rows
    "klein": {},
    "sana": {},
    "lumina2": {},
    "chroma": {},
    "flux2": {},
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in list(FLOW)[5:])) for n in FLOW])
def test_transformers_have_them_whatever_their_guidance(name, tmp_path):
    pipe = flow_zoo.make(name, tmp_path)
    encoders = [part for part in pipe.components if part.startswith("text_encoder")]
    adapt_all(pipe, "transformer", *(part for part in encoders if getattr(pipe, part) is not None))
    side = flow_zoo.SIDES.get(name, 16)
    assert_own(pipe, **FLOW[name], **flow_zoo.SIZED.get(name, {}), height=side, width=side)


def test_a_lora_is_an_adapter_like_others(tiny_pipeline):
    adapt_components(tiny_pipeline, "unet", name="cat", method="ether_plus")
    config = LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False)
    tiny_pipeline.unet.add_adapter(config, "style")
    entries, options = ["style", ("cat", 0.5), None, ("style", 1.0)], {"num_inference_steps": 2, "output_type": "np"}
    expected = []
    for entry, seed in zip(entries, generators(4), strict=True):
        name, strength = (entry, 1.0) if isinstance(entry, str) else entry or ("cat", 0.0)
        tiny_pipeline.set_adapters([name], [strength])
        expected.append(tiny_pipeline("a dog", generator=seed, **options).images[0])
    with tiny_pipeline.ether_adapters_per_prompt(entries):
        found = tiny_pipeline(["a dog"] * 4, generator=generators(4), **options).images
    assert np.abs(found - np.array(expected)).max() < SAME
    with pytest.raises(ValueError, match="style is a LoRA, which PEFT gives one strength"):
        with tiny_pipeline.ether_adapters_per_prompt(["style", ("style", 0.5)]):
            pass


def test_afterwards_the_pipeline_is_as_it_was(tiny_pipeline):
    pipe = with_two(tiny_pipeline)
    before, kind = snapshot(pipe), type(pipe)
    options = {"num_inference_steps": 2}
    image = mixed(pipe, 1, **options)
    together(pipe, 1, **options)
    with pytest.raises(RuntimeError, match="a fault"), pipe.ether_adapters_per_prompt(ENTRIES):
        raise RuntimeError("a fault")
    assert type(pipe) is kind and np.array_equal(mixed(pipe, 1, **options), image)
    assert_unchanged(pipe, before)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["dog", "dgo"], "there is no adapter dgo; loaded are cat, dog"),
        ("dog", "a list with an entry for each prompt fits"),
        ([], "a list with an entry for each prompt fits"),
        ([("dog", float("inf"))], "a name with a finite strength"),
        ([("dog",)], "a name with a finite strength"),
        ([3], "a name with a finite strength"),
    ],
)
def test_what_is_no_entry_is_refused(tiny_pipeline, entries, message):
    pipe = with_two(tiny_pipeline)
    with pytest.raises(ValueError, match=message), pipe.ether_adapters_per_prompt(entries):
        pass


def test_another_number_of_prompts_than_entries_is_refused(tiny_pipeline):
    pipe = with_two(tiny_pipeline)
    with pipe.ether_adapters_per_prompt(["dog", "cat"]):
        for prompts in ("a dog", ["a dog"] * 3, ["a dog"] * 4, ["a dog"]):
            with pytest.raises(ValueError, match="2 entries for . prompts: exactly one each fits"):
                pipe(prompts, num_inference_steps=1)
        embeds = torch.zeros(4, 16, 16)
        with pytest.raises(ValueError, match="2 entries for 4 prompts"):
            pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, num_inference_steps=1)


def test_batches_whose_rows_cannot_be_told_apart_are_refused(tiny_pipeline):
    pipe = with_two(tiny_pipeline)
    with pipe.ether_adapters_per_prompt(["dog", "cat"]):
        with pytest.raises(ValueError, match="unet is called outside of a call of the pipeline"):
            pipe.unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 16, 16))
        with pytest.raises(ValueError, match="text_encoder has a batch of 4 rows, but 2 prompts have 2"):
            pipe.text_encoder(torch.zeros(4, 16, dtype=torch.long))


def test_a_scale_for_all_is_refused(tiny_pipeline):
    pipe = with_two(tiny_pipeline)
    with pipe.ether_adapters_per_prompt(["dog"]), pytest.raises(ValueError, match="give each entry a strength"):
        pipe("a dog", num_inference_steps=1, cross_attention_kwargs={"scale": 0.5})


def test_fused_disabled_and_compiled_models_are_refused(tiny_pipeline):
    pipe = with_two(tiny_pipeline)

    def refused(message):
        with pytest.raises(ValueError, match=message), pipe.ether_adapters_per_prompt(["dog"]):
            pass

    pipe.disable_ether()
    refused("are disabled: call enable_ether")
    pipe.enable_ether()
    pipe.fuse_ether()
    refused("is fused: unfuse it first")
    pipe.unfuse_ether()
    pipe.unet.compile()
    refused("unet is compiled")


def test_adapters_with_a_control_encoder_are_refused(tiny_pipeline_folder, tmp_path):
    zoo.save_control("light", tiny_pipeline_folder, tmp_path)
    pipe = EtherControlPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.load_ether_weights(tmp_path, "edges")
    with pytest.raises(ValueError, match="edges holds a control encoder, which all rows"):
        with pipe.ether_adapters_per_prompt(["edges"]):
            pass
