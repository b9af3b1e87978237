"""Teach a diffusion model to follow control images: semantic maps, edges, poses, depth.

    accelerate launch train_controlnet_ether.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir data --validation_image map.png --validation_prompt "a red house" \\
        --mixed_precision fp16 --train_batch_size 8 --max_train_steps 20000 --output_dir out/maps

--control_type light, the paper's setting, trains a small encoder beside the reflections of a frozen UNet or
transformer and leaves one file; --control_type controlnet trains a ControlNet whose copied weights are frozen under
reflections, and leaves a stock ControlNet folder besides. Everything that can be wrong is checked before the weights
are loaded. A run that was stopped goes on with --resume_from_checkpoint latest.
Flags may also stand in a YAML or JSON file, by their names without dashes, given before all flags: maps.yaml --seed 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from PIL import Image

from ether_diffusion.images import INTERPOLATIONS, read_image
from ether_diffusion.training.control_classes import KEY as CLASSES_KEY
from ether_diffusion.training.control_classes import colours_of, parse_classes
from ether_diffusion.training.controlnet import ControlNetAdaptation
from ether_diffusion.training.data import TrainingImages, find_pairs
from ether_diffusion.training.data.views import Target, center_cut
from ether_diffusion.training.dry_run import describe_run
from ether_diffusion.training.entry import run_script
from ether_diffusion.training.light_control import LightControl
from ether_diffusion.training.loop import TrainingResult
from ether_diffusion.training.options import ControlTrainingOptions as Options
from ether_diffusion.training.options import parse_range
from ether_diffusion.training.run import CheckedRun, TrainingRun
from ether_diffusion.training.summary import tell_start


def run(options: Options, command: str) -> TrainingResult | None:
    """Train, then save, generate and describe what was learned; a dry run tells what it would do instead.

    Raises:
        InputError: what the user gave cannot be used; nothing heavy is loaded then.
    """
    kind = LightControl if options.control.control_type == "light" else ControlNetAdaptation
    planned = TrainingRun(options, command, kind, options.flow)
    images = TrainingImages(
        find_pairs(options.data, seed=options.run.seed, value_range=parse_range(options.control.conditioning_range)),
        interpolation=options.control.conditioning_interpolation,
        proportion_empty_prompts=options.data.proportion_empty_prompts,
        **planned.view_options,
    )
    controls, prompts = validation_pairs(options, images, planned.targets[0])
    given = options.control.control_classes
    classes = colours_of(controls[0]) if given is None else parse_classes(given)
    flag = "train_data_dir" if options.data.dataset_name is None else "dataset_name"
    checked = planned.check(epoch_samples=len(images), depends_on={flag: images.fingerprint})
    if options.run.dry_run:
        print(describe_run(checked, images.examples.describe()))
        return None
    with checked.claimed():
        return train(checked, images, controls, prompts, classes)


def train(
    checked: CheckedRun,
    images: TrainingImages,
    controls: Sequence[Image.Image],
    prompts: Sequence[str],
    classes: Mapping[str, str],
) -> TrainingResult:
    """All that takes long: the model, the training, and what it leaves.

    controls, prompts: of the sample images. classes: what the colours of control images stand for.
    """
    options, adaptation, what = checked.options, checked.run.adaptation, images.examples.describe()
    tell_start(checked, what)
    loaded = checked.load(prompts, {options.run.seed: images}, controls)
    objective = adaptation.objective(
        loaded.family,
        loaded.sets,
        trained=[name for name in adaptation.configs if name != adaptation.control],
        beside={adaptation.control: loaded.attached.models[adaptation.control]},
        snr_gamma=options.optimization.snr_gamma,
    )
    result = loaded.train(objective, what)
    about = {CLASSES_KEY: json.dumps(classes, ensure_ascii=False)} if classes else {}
    loaded.finish(result, prompt=prompts[0], images=what, metadata=about)
    return result


def validation_pairs(
    options: Options, images: TrainingImages, target: Target
) -> tuple[Sequence[Image.Image], Sequence[str]]:
    """The control images and prompts of the sample images, by default those of the first example.

    That one is read in any case, so that what is wrong with it shows at once.

    Raises:
        InputError: an image that cannot be read, or a pair of two shapes.
    """
    first = images.view(0)
    images.pixels(first)
    values = images.control(first).mul(255).round().byte().permute(1, 2, 0)
    value_range = parse_range(options.control.conditioning_range)
    pairs = [(read_image(path, value_range=value_range), prompt) for path, prompt in options.validation.pairs]
    pairs = pairs or [(Image.fromarray(values.numpy()), images.prompt(first, 0))]
    resample = INTERPOLATIONS[options.control.conditioning_interpolation]
    return [center_cut(image, target, resample) for image, _ in pairs], [prompt for _, prompt in pairs]


def main(arguments: Sequence[str] | None = None) -> TrainingResult | None:
    return run_script(run, Options, script="train_controlnet_ether.py", description=__doc__, arguments=arguments)


if __name__ == "__main__":
    main()
