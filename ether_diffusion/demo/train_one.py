"""One training for the page, in a process of its own, so that stopping or losing it touches nothing else.

    python -m ether_diffusion.demo.train_one '{"photos": …, "prompt": …, "method": …, "output_dir": …, "steps": …}'

Every line on stdout is a JSON object: {"step": 1, "loss": 0.2}, {"error": "…"}, or at the end {"done": true}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace

import torch

from ether_diffusion.demo.library import IMAGE_NAME
from ether_diffusion.errors import InputError
from ether_diffusion.training.data import TrainingImages, find_examples
from ether_diffusion.training.objectives import DreamBoothObjective
from ether_diffusion.training.options import (
    AdapterOptions,
    InstanceDataOptions,
    ModelOptions,
    OptimizationOptions,
    PerformanceOptions,
    RunOptions,
    StateOptions,
    TrainingOptions,
    ValidationOptions,
    ViewOptions,
)
from ether_diffusion.training.preview import generate
from ether_diffusion.training.run import TrainingRun

PREVIEWS = 4
"""How often sample images are generated in one training, the end included."""


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions):
    data: InstanceDataOptions


def options_of(task: dict) -> Options:
    """A task's options; whatever it does not name has the default of the training script."""
    return Options(
        model=ModelOptions(pretrained_model_name_or_path=task["base"]),
        views=ViewOptions(),
        data=InstanceDataOptions(instance_prompt=task["prompt"], instance_data_dir=task["photos"]),
        adapter=AdapterOptions(method=task["method"]),
        optimization=OptimizationOptions(max_train_steps=task["steps"]),
        performance=PerformanceOptions(),
        validation=ValidationOptions(
            num_validation_images=2,
            validation_steps=max(task["steps"] // PREVIEWS, 1),
            num_inference_steps=20,
            guidance_scale=5.0,
        ),
        state=StateOptions(),
        run=RunOptions(output_dir=task["output_dir"], seed=task["seed"]),
    )


def train(task: dict) -> None:
    """Train and save.

    Raises:
        InputError: photographs or a base that cannot be used.
    """
    options = options_of(task)
    run = TrainingRun(options, "ether-diffusion demo")
    examples = find_examples(options.data)
    images = TrainingImages(examples, **run.view_options)
    checked = run.check(epoch_samples=len(images), depends_on={"instance_data_dir": images.fingerprint})
    loaded = checked.load((options.data.instance_prompt,))
    family, configs = loaded.family, run.adaptation.configs
    objective = DreamBoothObjective(family, images, trained=list(configs), seed=options.run.seed)
    step = 0

    def told(_module: torch.nn.Module, _inputs: tuple, losses: torch.Tensor) -> None:
        nonlocal step
        step += 1  # one forward pass for every step of the optimiser
        say(step=step, loss=losses.mean().item())

    objective.register_forward_hook(told)
    what = f"{len(examples)} images"
    loaded.finish(loaded.train(objective, what), prompt=options.data.instance_prompt, images=what)
    one = replace(options.validation, num_validation_images=1)
    with family.on_device(*family.modules()):
        (image,) = generate(family.pipe, options.data.instance_prompt, one, options.run.seed)
    image.save(run.output_dir / IMAGE_NAME)


def say(**news: object) -> None:
    print(json.dumps(news), flush=True)


def main() -> int:
    try:
        train(json.loads(sys.argv[1]))
    except (InputError, FloatingPointError, OSError) as error:
        say(error=str(error))
        return 1
    say(done=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
