"""Teach a diffusion model a subject from a few photographs, with ETHER or ETHER+ (DreamBooth).

    accelerate launch train_dreambooth_ether.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir photos --instance_prompt "a photo of sks dog" \\
        --mixed_precision fp16 --train_batch_size 1 --output_dir out/dog

Without --pretrained_model_name_or_path it trains the miniature that comes with the package. Everything that can be
wrong is checked before the weights are loaded. A run that was stopped goes on with --resume_from_checkpoint latest.
Flags may also stand in a YAML or JSON file, by their names without dashes, given before all flags: dog.yaml --seed 1.
Written to --output_dir: the adapter, a grid of sample images of base and tuned model, and a model card.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.training.class_images import check_class_images, generate_class_images
from ether_diffusion.training.data import TrainingImages, examples_of, find_examples
from ether_diffusion.training.dry_run import describe_run
from ether_diffusion.training.entry import run_script
from ether_diffusion.training.loop import TrainingResult
from ether_diffusion.training.objectives import DenoisingObjective
from ether_diffusion.training.options import FlowOptions, InstanceDataOptions, PriorOptions, TrainingOptions
from ether_diffusion.training.run import CheckedRun, TrainingRun
from ether_diffusion.training.seeds import derive
from ether_diffusion.training.summary import tell_start


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions):
    data: InstanceDataOptions
    prior: PriorOptions
    flow: FlowOptions

    def __post_init__(self) -> None:
        super().__post_init__()
        self.run.check_apart("instance_data_dir", self.data.instance_data_dir)
        self.run.check_apart("dataset_name", self.data.dataset_name, with_folders=True)
        self.run.check_apart("class_data_dir", self.prior.class_data_dir)
        folders = (self.data.instance_data_dir, self.prior.class_data_dir)
        if None not in folders and len({Path(folder).resolve() for folder in folders}) == 1:
            raise InputError(f"--class_data_dir {folders[1]}: is the same folder as --instance_data_dir; take another")


def run(options: Options, command: str) -> TrainingResult | None:
    """Train, then save, generate and describe what was learned; a dry run tells what it would do instead.

    Raises:
        InputError: what the user gave cannot be used; nothing heavy is loaded then.
    """
    data, prior = options.data, options.prior
    planned = TrainingRun(options, command, flow=options.flow)
    check_references(planned, options)
    examples = find_examples(data)
    if prior.with_prior_preservation:
        check_class_images(planned.source, prior, options.run.seed)
    images = TrainingImages(
        examples,
        repeats=data.repeats,
        interpolation="lanczos",
        proportion_empty_prompts=data.caption_dropout or 0.0,
        **planned.view_options,
    )
    flag = "instance_data_dir" if data.dataset_name is None else "dataset_name"
    checked = planned.check(
        epoch_samples=len(images),
        depends_on={flag: images.fingerprint},
        later=["class_data_dir"] if prior.with_prior_preservation else (),
    )
    if options.run.dry_run:
        per_sample, references = 1 + prior.with_prior_preservation, int(data.reference_dir is not None)
        print(describe_run(checked, examples.describe(), per_sample=per_sample, references=references))
        return None
    with checked.claimed():
        return train(checked, images)


def check_references(planned: TrainingRun, options: Options) -> None:
    """Make sure that the pipeline takes reference images where some are given, and that it has those that it needs.

    Raises:
        InputError: it does not, or has not.
    """
    family, name = planned.family_class, planned.family_class.pipeline_class
    if options.data.reference_dir is not None and not family.takes_references:
        raise InputError(f"--reference_dir: {name} takes no reference images; drop it")
    if not family.reads_references:
        return
    if options.data.reference_dir is None:
        raise InputError(f"--reference_dir: is missing; {name} reads its prompts together with reference images")
    if options.prior.with_prior_preservation:
        raise InputError(f"--with_prior_preservation: {name} generates nothing without reference images; drop it")
    if not (options.performance.cache_latents or options.views.center_crop):
        raise InputError(
            f"--reference_dir: a {name} encodes prompts beside reference images, once; add --cache_latents or "
            "--center_crop, so that few views come"
        )


def train(checked: CheckedRun, images: TrainingImages) -> TrainingResult:
    """All that takes long: the images of the class, the model, the training, and what it leaves."""
    planned, options = checked.run, checked.options
    data, prior = options.data, options.prior
    seed, what = options.run.seed, images.examples.describe()
    tell_start(checked, what)
    drawn_from = {seed: images}
    if prior.with_prior_preservation:
        class_images = generated_class_images(planned, prior)
        checked.checkpoints.bind("class_data_dir", class_images.fingerprint)
        # A seed of its own: a class image beside one of the subject gets another timestep and other noise.
        drawn_from[derive(seed, "class pictures")] = class_images
        what += f" and {len(class_images)} of the class"

    prompts = options.validation.validation_prompt or (data.instance_prompt,)
    reference = None
    if data.reference_dir is not None:
        pixels = images.reference(images.view(0)).add(1).mul(127.5).round().byte()
        reference = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    loaded = checked.load(prompts, drawn_from, reference=reference)
    objective = DenoisingObjective(
        loaded.family,
        loaded.sets,
        trained=list(planned.adaptation.configs),
        snr_gamma=options.optimization.snr_gamma,
        prior_loss_weight=prior.prior_loss_weight,
    )
    result = loaded.train(objective, what)
    loaded.finish(result, prompt=data.instance_prompt, images=what)
    return result


def generated_class_images(planned: TrainingRun, prior: PriorOptions) -> TrainingImages:
    """The images of the class, when those that are missing have been generated."""
    paths = generate_class_images(
        planned.source,
        planned.family_class,
        prior,
        planned.accelerator,
        precision=planned.precision,
        seed=planned.options.run.seed,
        target=planned.targets[0],
        performance=planned.options.performance,
    )
    return TrainingImages(examples_of(paths, str(prior.class_prompt)), **planned.view_options)


def main(arguments: Sequence[str] | None = None) -> TrainingResult | None:
    return run_script(run, Options, script="train_dreambooth_ether.py", description=__doc__, arguments=arguments)


if __name__ == "__main__":
    main()
