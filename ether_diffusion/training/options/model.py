"""Which base model is trained."""

from dataclasses import dataclass

from ether_diffusion.training.options.base import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """base model"""

    pretrained_model_name_or_path: str | None = option(
        "A diffusers pipeline, as a folder or an id on the Hub. Default: the miniature that comes with the package.",
        None,
    )
    revision: str | None = option("Branch, tag or commit of the model on the Hub.", None)
    variant: str | None = option('Variant of the weight files, such as "fp16".', None)
