#!/usr/bin/env python
"""Teach a diffusion model to follow control pictures: semantic maps, edges, poses, depth.

    accelerate launch train_controlnet_ether.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir data --validation_image map.png --validation_prompt "a red house" \\
        --mixed_precision fp16 --train_batch_size 8 --max_train_steps 20000 --output_dir out/maps

--control_type light, the paper's setting, trains a small encoder beside the reflections of a frozen UNet and leaves
one file; --control_type controlnet trains a ControlNet whose copied weights are frozen under reflections, and leaves a
stock ControlNet folder besides. Everything that can be wrong is checked before the weights are loaded. A run that was
stopped goes on with --resume_from_checkpoint latest.
"""

from collections.abc import Sequence

from ether_diffusion.training.control_data import ControlImages, find_pairs
from ether_diffusion.training.control_options import ControlTrainingOptions as Options
from ether_diffusion.training.control_run import ControlRun
from ether_diffusion.training.entry import run_script
from ether_diffusion.training.loop import TrainingResult


def run(options: Options, command: str) -> TrainingResult:
    """Train, then save, paint and describe what was learned. Raises InputError before anything heavy is loaded."""
    training = ControlRun(options, command)
    images = ControlImages(
        find_pairs(options.data, seed=options.run.seed),
        interpolation=options.control.conditioning_interpolation,
        proportion_empty_prompts=options.data.proportion_empty_prompts,
        **training.view_options,
    )
    training.check_pictures(images)
    flag = "train_data_dir" if options.data.dataset_name is None else "dataset_name"
    training.check(epoch_samples=len(images), depends_on={flag: images.fingerprint})
    prompts = [prompt for _, prompt in training.validation_pairs]
    training.load(prompts)
    result = training.train(training.objective(images), images.describe())
    training.finish(result, prompt=prompts[0], pictures=images.describe())
    return result


def main(arguments: Sequence[str] | None = None) -> TrainingResult:
    return run_script(run, Options, script=__file__, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    main()
