"""What a run shows and where it writes and reports, how it goes on, and all options together."""

from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.errors import InputError
from ether_diffusion.training.options.base import FROM_ZERO, NOT_NEGATIVE, POSITIVE, PROMPTS, Fits, OptionGroup, option
from ether_diffusion.training.options.data import ViewOptions
from ether_diffusion.training.options.model import AdapterOptions, ModelOptions
from ether_diffusion.training.options.optimization import OptimizationOptions
from ether_diffusion.training.options.performance import PerformanceOptions

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
"""Sampling schedulers of diffusers that take the noise schedules which training covers."""
SEEDS = 2**64
"""How many there are: those that PyTorch takes."""
SEED = Fits(f"a whole number from 0 to {SEEDS - 1}", lambda value: 0 <= value < SEEDS)
GUIDANCE_SCALE = 7.5
"""Of sample images of a UNet, unless another is asked for."""
VALIDATION_FOLDER = "validation"
"""Where the images that are made during the training lie in the output folder."""
ALL_DATA, DATA_FLAGS = "data", ("instance_data_dir", "train_data_dir", "dataset_name", "class_data_dir")
"""What --resume_with_changed takes: all data, or that of single flags."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(OptionGroup):
    """sample images"""

    validation_prompt: tuple[str, ...] | None = option(
        "Prompts to generate with base and tuned model. Default: the instance prompt.", None, fits=PROMPTS, free=True
    )
    num_validation_images: int = option("Images per prompt; 0 generates none.", 4, fits=NOT_NEGATIVE, free=True)
    validation_steps: int | None = option(
        "Generate after every so many optimiser steps. The end of the training is always generated.",
        None,
        fits=POSITIVE,
        without="num_validation_images 0",
        free=True,
    )
    validation_epochs: int | None = option(
        "Generate after every so many epochs, in place of --validation_steps.",
        None,
        fits=POSITIVE,
        without=("validation_steps", "num_validation_images 0"),
        free=True,
    )
    num_inference_steps: int = option("Denoising steps per image.", 25, fits=POSITIVE, free=True)
    guidance_scale: float | None = option(
        f"Guidance of the images. Default: {GUIDANCE_SCALE} for Stable Diffusion 1, 2 and XL; of other pipelines "
        "their own.",
        None,
        fits=FROM_ZERO,
        free=True,
    )
    validation_scheduler: str | None = option(
        "Sampling scheduler of the images, by its name in diffusers. Default: the model's own.",
        None,
        choices=SCHEDULERS,
        without="num_validation_images 0",
        free=True,
    )


@dataclass(frozen=True, kw_only=True)
class StateOptions(OptionGroup):
    """stopping and going on"""

    checkpointing_steps: int = option(
        "Save a checkpoint, from which the run can go on, after every so many optimiser steps. Ctrl-C and SIGTERM "
        "save one as well.",
        100,
        fits=POSITIVE,
        free=True,
    )
    checkpoints_total_limit: int | None = option(
        "Keep at most so many checkpoints; the oldest goes when a new one is complete. Default: keep all.",
        None,
        fits=POSITIVE,
        free=True,
    )
    resume_from_checkpoint: str | None = option(
        'Go on from a checkpoint: its folder or name, or "latest" for the last whole one in --output_dir (where there '
        "is none, the run starts at the beginning). The result is that of a run that never stopped.",
        None,
        free=True,
        path=True,
    )
    overwrite_output_dir: bool = option(
        "Replace what an earlier run left in --output_dir, its checkpoints included; without this flag a run does not "
        "start there, unless it goes on.",
        False,
        free=True,
    )
    resume_with_changed: tuple[str, ...] | None = option(
        "What of the data may differ from the checkpoint's, where images were repaired or added: data for all of it, "
        f"or flags by their names ({', '.join(DATA_FLAGS)}).",
        None,
        fits=Fits(
            f"data, or names of flags: {', '.join(DATA_FLAGS)}", lambda names: {*names} <= {ALL_DATA, *DATA_FLAGS}
        ),
        needs="resume_from_checkpoint",
        free=True,
    )

    @property
    def may_differ(self) -> frozenset[str]:
        """The flags whose data may be others than the checkpoint's."""
        names = self.resume_with_changed or ()
        return frozenset(DATA_FLAGS if ALL_DATA in names else names)


@dataclass(frozen=True, kw_only=True)
class RunOptions(OptionGroup):
    """run"""

    output_dir: str = option(
        "Folder for the adapter, the model card and the images.",
        "ether-dreambooth",
        free=True,
        path=True,
    )
    seed: int = option("Every random number follows from it; two runs with one seed agree.", 0, fits=SEED)
    dry_run: bool = option(
        "Check everything, tell what would be trained, written and needed, and end without reading weights.",
        False,
        free=True,
    )
    report_to: tuple[str, ...] = option(
        "Where to log loss, learning rate, options and sample images.",
        ("none",),
        choices=("tensorboard", "wandb", "all", "none"),
        free=True,
    )
    logging_dir: str = option(
        "Folder of the logs, inside --output_dir unless absolute.",
        "logs",
        free=True,
        path=True,
    )
    push_to_hub: bool = option("Upload what the run leaves to the Hub when it is done.", False, free=True)
    hub_model_id: str | None = option(
        "Repository on the Hub. Default: the name of --output_dir, under the user's own name.",
        None,
        needs="push_to_hub",
        free=True,
    )

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):  # from Python
            object.__setattr__(self, "report_to", (self.report_to,))
        super().__post_init__()
        if "none" in self.report_to and len(self.report_to) > 1:
            raise InputError(f"--report_to {' '.join(self.report_to)}: none contradicts the others; drop one")

    def check_apart(self, flag: str, folder: str | None, *, with_folders: bool = False) -> None:
        """Make sure that the images which the run makes are not among those that it reads.

        Args:
            flag: that names a folder of images.
            folder: its value.
            with_folders: whether images in folders of that folder are read as well.

        Raises:
            InputError: they would be.
        """
        if folder is None:
            return
        read, output = Path(folder).resolve(), Path(self.output_dir).resolve()
        written = (output, output / VALIDATION_FOLDER)
        coincides = read in written or (with_folders and read in output.parents)
        if coincides and not any(read.rglob("*.parquet")):  # tables hold their images themselves
            raise InputError(
                f"--{flag} {folder}: images that the run makes in --output_dir {self.output_dir} would be taken for "
                "those to train on; take another --output_dir"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What every training script can be told. A script adds groups of its own.

    Raises:
        InputError: options of two groups that contradict each other.
    """

    model: ModelOptions
    views: ViewOptions
    adapter: AdapterOptions
    optimization: OptimizationOptions
    performance: PerformanceOptions
    validation: ValidationOptions
    state: StateOptions
    run: RunOptions

    def __post_init__(self) -> None:
        encoders_train = self.adapter.train_text_encoder
        if self.optimization.text_encoder_lr is not None and not encoders_train:
            raise InputError("--text_encoder_lr: has no effect without --train_text_encoder; add it")
        if self.performance.pre_compute_text_embeddings and encoders_train:
            raise InputError(
                "--pre_compute_text_embeddings: contradicts --train_text_encoder, which changes them; drop one"
            )
