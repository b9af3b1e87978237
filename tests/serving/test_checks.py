"""What cannot be served is refused in one sentence, before anything runs or waits."""

import pytest
from accelerate import cpu_offload
from diffusers import FluxPipeline, StableDiffusionPAGPipeline
from helpers import flow_zoo
from helpers.pipelines import adapt, open_pipeline
from helpers.scripts import wait_until
from peft import LoraConfig

from ether_diffusion import EtherControlPipeline
from ether_diffusion.errors import InputError
from ether_diffusion.serving import Engine, EngineFull


def refused(pipe, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        Engine(pipe, max_batch=1)
    assert "\n" not in str(caught.value)


def test_adapters_that_are_attached_or_fused_are_refused(tiny_pipeline):
    tiny_pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    refused(tiny_pipeline, "unet has an adapter attached: unload it")
    tiny_pipeline.unload_lora_weights()
    adapt(tiny_pipeline)
    refused(tiny_pipeline, "has an adapter attached")
    tiny_pipeline.fuse_ether()
    refused(tiny_pipeline, "has a fused adapter: unfuse it")


def test_replaced_modules_are_refused(tiny_pipeline, tmp_path):
    tiny_pipeline.save_ether_weights(tmp_path, "whole", replaced_modules={"unet": ["conv_in"]})
    tiny_pipeline.load_ether_weights(tmp_path, "whole")
    refused(tiny_pipeline, "replaced modules of the adapter 'whole': unload_ether_weights")


def test_offloaded_models_are_refused(tiny_pipeline):
    cpu_offload(tiny_pipeline.unet, execution_device="cpu")
    refused(tiny_pipeline, "unet is offloaded")


def test_pipelines_that_change_the_model_while_they_generate_are_refused(tiny_pipeline):
    refused(StableDiffusionPAGPipeline.from_pipe(tiny_pipeline), "perturbed attention guidance")


@pytest.fixture(scope="module")
def engine(tiny_pipeline_folder):
    with Engine(open_pipeline(tiny_pipeline_folder), max_batch=1, max_line=2) as engine:
        yield engine
        engine.close(drain=False)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"promt": "a dog"}, "promt: StableDiffusionPipeline takes no such argument; it takes prompt"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"num_inference_steps": "many"}, "num_inference_steps='many'"),
        ({"pipeline": 3}, "pipeline: got a int; a class of pipelines fits"),
        ({"pipeline": FluxPipeline}, "a FluxPipeline needs text_encoder_2, tokenizer_2, transformer"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "scale=0.5; an adapter's strength"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": 2**63}, "below"),
        ({"seed": 1, "generator": "one"}, "pass one"),
        ({"timeout": 0}, "timeout=0"),
        ({"adapter": "dog"}, "made without a folder of adapters"),
        ({"adapter": {"dog": float("inf")}}, "'dog': strength inf"),
        ({"adapter": 3}, "adapter=3"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_waits(engine, arguments, match):
    with pytest.raises(InputError, match=match):
        engine.submit(**{"prompt": "a dog"} | arguments)
    assert engine.waiting == engine.running == 0


def test_a_control_image_needs_a_pipeline_that_applies_control_encoders(tmp_path):
    with Engine(flow_zoo.make("kontext", tmp_path), max_batch=1) as engine:
        with pytest.raises(
            InputError, match="FluxKontextPipeline: there is light control for StableDiffusionPipeline, "
        ):
            engine.submit(prompt="a dog", control_image="an image")


def test_a_full_line_refuses_more(engine):
    jobs = []
    with pytest.raises(EngineFull, match="max_line=2"):
        for _ in range(4):
            jobs.append(engine.submit(prompt="a dog", num_inference_steps=900))
    assert len(jobs) in (2, 3)
    for job in jobs:
        job.cancel()


def test_requests_that_are_submitted_together_are_in_line_all_or_none(engine):
    wait_until(lambda: engine.running == 0)  # what others have cancelled ends at its next step
    with pytest.raises(EngineFull, match="3 more exceed the limit .max_line=2"):
        engine.submit_all([{"prompt": "a dog"}] * 3)
    with pytest.raises(InputError, match="no_such"):
        engine.submit_all([{"prompt": "a dog"}, {"prompt": "a dog", "no_such": 1}])
    assert engine.waiting == engine.running == 0
    first, second = engine.submit_all([{"prompt": "a dog", "seed": seed} for seed in (1, 2)])
    assert (first.seed, second.seed) == (1, 2) and len(first.result().images) == len(second.result().images) == 1


def test_a_control_pipeline_without_control_images_is_served_as_its_stock_class(tiny_pipeline):
    pipe = EtherControlPipeline.from_pipe(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    with Engine(pipe, max_batch=2) as engine:
        assert engine.submit(prompt="a dog", num_inference_steps=2).result(60).images
