"""What can be asked of an evaluation of control: the flags of its command, without what carries it out."""

from dataclasses import dataclass
from pathlib import Path

from ether_diffusion.errors import InputError
from ether_diffusion.training.options.base import POSITIVE, OptionGroup, option
from ether_diffusion.training.options.control import RANGE
from ether_diffusion.training.options.run import GUIDANCE_SCALE

INCEPTION, MINIATURE, NO_FEATURES = "inception", "miniature", "none"
"""What features the Fréchet distance is of."""
FEATURE_WIDTHS = {INCEPTION: 2048, MINIATURE: 128}
"""The Fréchet distance of fewer images than its features are wide comes out too high.

Source: the estimate of the covariance has no full rank then, and the distance is biased: arXiv:1911.07023."""
UPERNET = "openmmlab/upernet-convnext-small"


@dataclass(frozen=True, kw_only=True)
class ControlEvaluation(OptionGroup):
    """What an evaluation of control is made with: the flags of `ether-diffusion evaluate-control`."""

    base: str | None = option("A pipeline, a folder or an id on the Hub. Default with --miniature: its own.", None)
    variant: str | None = option('Variant of the base\'s weight files, such as "fp16".', None)
    revision: str | None = option("Branch, tag or commit of the base on the Hub.", None)
    adapter: str = option("A file, folder or id of an adapter with control, or a folder of a ControlNet.")
    data_dir: Path | None = option("Folder with metadata.jsonl, see above.", None)
    miniature: int | None = option(
        "In place of --data_dir: so many held-out maps of the miniature.", None, fits=POSITIVE
    )
    output_dir: Path = option("Folder for report.json and sheet.png.")
    max_samples: int | None = option("Use only the first so many lines of --data_dir.", None, fits=POSITIVE)
    num_inference_steps: int = option("Denoising steps of each image.", 25, fits=POSITIVE)
    guidance_scale: float | None = option(
        f"Guidance by the caption. Default: {GUIDANCE_SCALE} with a UNet, else the pipeline's own.", None
    )
    controlnet_conditioning_scale: float = option("Strength of control.", 1.0)
    seed: int = option("Of the noise that images start from. Default: 0.", 0)
    batch_size: int = option("Images at once.", 4, fits=POSITIVE)
    evaluator: str | None = option(
        "miniature: trained here in a few minutes; edges: F1 of Sobel edges, for edge maps; or a UperNet, a folder or "
        f"an id on the Hub. Default: {UPERNET}, with --miniature its own.",
        None,
    )
    evaluator_dir: Path | None = option(
        "Folder where the miniature's evaluator is kept. Default: in --output_dir.", None
    )
    conditioning_range: str | None = option(
        'What is black and what is white in control images of more than 8 bits, as in training: "0,4095".',
        None,
        fits=RANGE,
    )
    reduce_labels: bool = option("Grey value 0 is no class and the classes start at 1, as in ADE20K.", False)
    fid_features: str | None = option(
        "Extractor of the Fréchet distance. Default: inception, with --miniature its own, which is not comparable "
        "with published FIDs.",
        None,
        choices=(INCEPTION, MINIATURE, NO_FEATURES),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_one_given("data_dir", "miniature")
        if self.base is None and self.miniature is None:
            needed = "a pipeline, a folder or an id on the Hub (only --miniature has its own)"
            raise InputError(f"--base: missing; needs {needed}")
