"""Which base model is trained, and how it is adapted."""

from dataclasses import dataclass

from ether_diffusion.errors import InputError
from ether_diffusion.training.options.base import POSITIVE, OptionGroup, option

# Chosen on the miniature (docs/training.md); a learning rate given by the user takes their place.
LEARNING_RATES = {
    "ether": 2e-3,
    "ether_plus": 1e-3,
    "lora": 3e-4,
    "oft": 3e-4,
    "boft": 1e-3,
    "hra": 3e-3,
    "vera": 3e-3,
    "full": 1e-5,
}
METHODS = tuple(LEARNING_RATES)
DEFAULT_METHOD = "ether_plus"
ETHER_METHODS = ("ether", "ether_plus")
RANKED_METHODS = {"lora": 4, "hra": 2, "vera": 256}
"""Methods with a rank, and the rank they have unless another is given."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """base model"""

    pretrained_model_name_or_path: str | None = option(
        "A diffusers pipeline, as a folder or an id on the Hub, or all its weights as one .safetensors file. Default: "
        "miniature, a small UNet that comes with the package; there is a small transformer, too: miniature-dit.",
        None,
        path=True,
    )
    config_name_or_path: str | None = option(
        "For weights in one file: a pipeline with the same configs and tokenizers, a folder or an id on the Hub. "
        "Default: the one on the Hub that diffusers knows for files of this kind.",
        None,
        needs="pretrained_model_name_or_path",
        path=True,
    )
    revision: str | None = option("Branch, tag or commit of the model on the Hub.", None)
    pretrained_vae_model_name_or_path: str | None = option(
        "An autoencoder to use in place of the model's own, a folder or an id on the Hub.", None, path=True
    )
    variant: str | None = option('Variant of the weight files, such as "fp16".', None)


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(OptionGroup):
    """method"""

    method: str | None = option(
        "ether: one reflection per layer. ether_plus: starts at the base model, moves both sides, four times as many "
        "parameters. lora, oft, boft, hra, vera: PEFT's. full: all weights of the denoiser, saved as a pipeline. "
        f"Default: {DEFAULT_METHOD}.",
        None,
        choices=METHODS,
        without="adapter_config",
    )
    adapter_config: str | None = option(
        "In place of --method: a JSON file with a PEFT config, as adapter_config.json in a folder that PEFT saved.",
        None,
        free=True,
        path=True,
    )
    num_blocks: int = option(
        "Blocks per layer of ether and ether_plus; must divide the width of every adapted layer.",
        1,
        fits=POSITIVE,
        without="adapter_config",
    )
    rank: int | None = option(
        "Rank of the methods that have one. Default: "
        + ", ".join(f"{method} {rank}" for method, rank in RANKED_METHODS.items())
        + ".",
        None,
        fits=POSITIVE,
        without="adapter_config",
    )
    target_modules: tuple[str, ...] | None = option(
        "The denoiser's layers to adapt: endings of their names; attention, which is the default: the projections of "
        "the family's attention, in every block; all-linear: every linear layer of its blocks; or one regular "
        "expression of whole names.",
        None,
        without=("method full", "method none"),
    )
    train_text_encoder: bool = option("Adapt the text encoders as well.", False, without="method none")
    text_encoder_target_modules: tuple[str, ...] | None = option(
        "As --target_modules, for the text encoders.", None, needs="train_text_encoder", without="method full"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_config is not None:
            return
        method = self.method_name
        if self.num_blocks != 1 and method not in ETHER_METHODS:
            raise InputError(f"--num_blocks: got {self.num_blocks}, has no effect with --method {method}")
        if self.rank is not None and method not in RANKED_METHODS:
            known = ", ".join(RANKED_METHODS)
            raise InputError(f"--rank: got {self.rank}, has no effect with --method {method}, only with {known}")

    @property
    def method_name(self) -> str:
        """The method asked for, else the default; without meaning beside an adapter config."""
        return DEFAULT_METHOD if self.method is None else self.method
