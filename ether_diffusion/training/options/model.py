"""Which base model is trained."""

from dataclasses import dataclass

from ether_diffusion.training.options.base import TEXT, OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """base model"""

    pretrained_model_name_or_path: str | None = option(
        "A diffusers pipeline, as a folder or an id on the Hub. Default: the miniature that comes with the package.",
        None,
        fits=TEXT,
    )
    revision: str | None = option("Branch, tag or commit of the model on the Hub.", None, fits=TEXT)
    variant: str | None = option('Variant of the weight files, such as "fp16".', None, fits=TEXT)
