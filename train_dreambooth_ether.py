#!/usr/bin/env python
"""Teach a diffusion model a subject from a few photographs, with ETHER or ETHER+ (DreamBooth).

    accelerate launch train_dreambooth_ether.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir photos --instance_prompt "a photo of sks dog" \\
        --mixed_precision fp16 --train_batch_size 1 --output_dir out/dog

Without --pretrained_model_name_or_path it trains the miniature that comes with the package. Everything that can be
wrong is checked before the weights are loaded. A run that was stopped goes on with --resume_from_checkpoint latest.
Written to --output_dir: the adapter, a grid of sample pictures of base and tuned model, and a model card.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import PartialState

from ether_diffusion.attention import enable_ether_attention
from ether_diffusion.training.adapters import adapter_configs, add_adapters, rehearse, trained_parameters
from ether_diffusion.training.card import GRID_NAME, launch_command, write_card
from ether_diffusion.training.data import InstanceImages, find_images
from ether_diffusion.training.families import ModelSource, family_at
from ether_diffusion.training.loop import WEIGHT_DTYPES, TrainingResult, check_output_dir, make_accelerator, train
from ether_diffusion.training.objective import DreamBoothObjective
from ether_diffusion.training.options import (
    AdapterOptions,
    InputError,
    InstanceDataOptions,
    ModelOptions,
    OptimizationOptions,
    RunOptions,
    StateOptions,
    ValidationOptions,
    binding,
    flatten,
    parse_options,
)
from ether_diffusion.training.preview import compare
from ether_diffusion.training.state import Checkpoints, Interrupted, fingerprint

logger = logging.getLogger("train_dreambooth_ether")


@dataclass(frozen=True, kw_only=True)
class Options:
    model: ModelOptions
    data: InstanceDataOptions
    adapter: AdapterOptions
    optimization: OptimizationOptions
    validation: ValidationOptions
    state: StateOptions
    run: RunOptions


def run(options: Options, command: str) -> TrainingResult:
    """Train, save the adapter, then paint and describe it. Raises InputError before anything heavy is loaded."""
    # What can fail, fails here.
    paths = find_images(options.data.instance_data_dir)
    source = ModelSource.from_options(options.model)
    family_class = family_at(source)
    blueprint = family_class.read_blueprint(source)
    images = InstanceImages(
        paths,
        prompt=options.data.instance_prompt,
        resolution=blueprint.fit_resolution(options.data.resolution),
        center_crop=options.data.center_crop,
        random_flip=options.data.random_flip,
        seed=options.run.seed,
    )
    configs = adapter_configs(family_class, options.adapter)
    count = rehearse(blueprint.models, configs)
    output_dir = check_output_dir(options.run.output_dir)
    accelerator = make_accelerator(options.run, options.optimization)
    given = binding(options) | {"instance_data_dir": fingerprint(paths)}
    given |= {"mixed_precision": accelerator.mixed_precision, "num_processes": accelerator.num_processes}
    checkpoints = Checkpoints(output_dir, options.state, given)
    checkpoints.check_space(count)

    # The model, its adapter, and the training.
    family = family_class.load(source, WEIGHT_DTYPES[accelerator.mixed_precision])
    family.freeze(accelerator.device)
    models = {name: family.component(name) for name in configs}
    add_adapters(models, configs, seed=options.run.seed)
    if options.optimization.attention:
        enable_ether_attention(models[family.denoiser], options.optimization.attention)
    if options.optimization.gradient_checkpointing:
        family.enable_gradient_checkpointing(list(configs))
    rate = options.optimization.learning_rate_of(options.adapter.method)
    if accelerator.is_main_process:
        where = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
        logger.info(
            "%s: %d parameters on %s, %d pictures, %s", options.adapter.method, count, source.name, len(images), where
        )
    result = train(
        accelerator,
        DreamBoothObjective(family, images, trained=list(configs), seed=options.run.seed),
        trained_parameters(models, configs),
        options.optimization,
        learning_rate=rate,
        checkpoints=checkpoints,
        tracked=flatten(options),
    )

    # The adapter first: whatever happens to the pictures, it is there.
    if accelerator.is_main_process:
        path = family.pipe.save_ether_weights(output_dir, metadata={"prompt": images.prompt})
        logger.info("adapter: %s", path)
        prompts = options.validation.validation_prompt or (images.prompt,)
        if options.validation.num_validation_images:
            grid, _ = compare(family.pipe, list(models.values()), prompts, options.validation, options.run.seed)
            grid.save(output_dir / GRID_NAME)
            logger.info("pictures: %s", output_dir / GRID_NAME)
        write_card(
            output_dir,
            source=source,
            method=options.adapter.method,
            prompt=images.prompt,
            prompts=prompts,
            parameters=count,
            learning_rate=rate,
            command=command,
            result=result,
            with_pictures=bool(options.validation.num_validation_images),
        )
    accelerator.end_training()
    return result


def main(arguments: Sequence[str] | None = None) -> TrainingResult:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = parse_options(Options, arguments, __doc__)
        return run(options, launch_command(__file__, arguments))
    except Interrupted as stop:
        if PartialState().is_main_process:
            logger.info("%s", stop)
        raise SystemExit(stop.exit_code) from stop
    except (InputError, FloatingPointError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
