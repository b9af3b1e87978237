"""The methods of training: ETHER, those of PEFT, and all weights; which config each component gets."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from peft import BOFTConfig, HRAConfig, LoraConfig, PeftConfig, VeraConfig

from ether_diffusion.errors import InputError
from ether_diffusion.training.families import Family
from ether_diffusion.training.methods.config_file import read_config
from ether_diffusion.training.methods.injection import ALL_LINEAR, FittedOFTConfig
from ether_diffusion.training.options import LEARNING_RATES, RANKED_METHODS, AdapterOptions
from ether_diffusion.tuner.config import EtherConfig
from ether_diffusion.tuner.model import CLIP_ATTENTION

KNOWN: dict[str, tuple[str, str | None]] = {
    "ether": ("ETHER", "2405.20271"),
    "ether_plus": ("ETHER+", "2405.20271"),
    "lora": ("LoRA", "2106.09685"),
    "oft": ("OFT", "2306.07280"),
    "boft": ("BOFT", "2311.06243"),
    "hra": ("HRA", "2405.17484"),
    "vera": ("VeRA", "2310.11454"),
    "full": ("full finetuning", None),
    "none": ("no adapter", None),
}
"""Method -> its name for people, and the arXiv id of its paper."""
ATTENTION_LAYERS = "attention"
PATTERN_CHARACTERS = set("\\^$*+?|()[]{}")
FIELDS_NAMING_LAYERS = (
    "alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "rank_pattern",
)  # fmt: skip
"""They name layers of the denoiser, so they are left out for text encoders."""


@dataclass(frozen=True)
class Method:
    """What is trained.

    name: as for `--method`; of an `--adapter_config`, that of the method it holds, else the lower-case PEFT type.
    title: the name for people.
    learning_rate: its default, or None where there is none.
    paper: its arXiv id, where known.
    config: what `--adapter_config` holds, or None.
    """

    name: str
    title: str
    learning_rate: float | None
    paper: str | None
    config: PeftConfig | None = None

    @property
    def layout(self) -> Literal["ether", "lora", "peft", "full"]:
        """What is saved: a file of a kind that pipelines load, a PEFT folder per component, or a pipeline."""
        if self.name in ("ether", "ether_plus"):
            return "ether"
        return self.name if self.name in ("lora", "full") else "peft"


def read_method(options: AdapterOptions) -> Method:
    """The method that the options ask for.

    Raises:
        InputError: an `--adapter_config` that is not there or is no PEFT config, or one whose type or values cannot be
            trained or saved here.
    """
    if options.adapter_config is None:
        name, config = options.method_name, None
    else:
        config = read_config(options.adapter_config)
        name = config.method if isinstance(config, EtherConfig) else str(config.peft_type.value).lower()
    title, paper = KNOWN.get(name, (name.upper(), None))
    return Method(name, title, LEARNING_RATES.get(name), paper, config)


def configs_of(method: Method, family: type[Family], options: AdapterOptions) -> dict[str, PeftConfig | None]:
    """Component -> config, for the components that are trained; None where all of its weights are.

    Raises:
        InputError: an adapter that the text encoders could not be loaded with.
    """
    given = {family.denoiser: options.target_modules}
    if options.train_text_encoder:
        if not family.trained_text_encoders:
            raise InputError(
                f"--train_text_encoder: {family.pipeline_class} has a language model as text encoder, which is not "
                "trained; drop it"
            )
        given |= dict.fromkeys(family.trained_text_encoders, options.text_encoder_target_modules)
    if method.name == "none":  # of control training, where something else is trained
        return {}
    if method.name == "full":
        return dict.fromkeys(given)
    if options.train_text_encoder and getattr(method.config, "use_dora", False):
        raise InputError(
            "--train_text_encoder: with use_dora in --adapter_config, transformers loses the magnitudes when the text "
            "encoders' weights are loaded; drop one"
        )
    configs: dict[str, PeftConfig | None] = {}
    for component, names in given.items():
        is_denoiser = component == family.denoiser
        default = family.targets if is_denoiser else CLIP_ATTENTION
        targets = _targets(names, default)
        if method.config is None:
            configs[component] = _default_config(method.name, targets, options)
            continue
        config = copy.deepcopy(method.config)
        if not is_denoiser:
            for each in dataclasses.fields(config):
                if each.name in FIELDS_NAMING_LAYERS:
                    made = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
                    setattr(config, each.name, made)
        if names or not is_denoiser or config.target_modules is None:
            config.target_modules = targets if isinstance(targets, str) else set(targets)
        configs[component] = config
    return configs


def _targets(names: Sequence[str] | None, default: Sequence[str] | str) -> list[str] | str:
    """The layers to adapt as PEFT takes them: endings of names, or a text that is a pattern of whole names."""
    if names is None or tuple(names) == (ATTENTION_LAYERS,):
        return default if isinstance(default, str) else list(default)
    if tuple(names) == (ALL_LINEAR,):
        return ALL_LINEAR
    for word in {ATTENTION_LAYERS, ALL_LINEAR} & set(names):
        raise InputError(f"--target_modules {' '.join(names)}: {word} stands alone; name layers, or give it by itself")
    if len(names) == 1 and set(names[0]) & PATTERN_CHARACTERS:
        return names[0]
    return list(names)


def _default_config(name: str, targets: list[str] | str, options: AdapterOptions) -> PeftConfig:
    rank = RANKED_METHODS.get(name) if options.rank is None else options.rank
    if name == "lora":  # alpha = r, as in diffusers' DreamBooth script
        return LoraConfig(target_modules=targets, r=rank, lora_alpha=rank, init_lora_weights="gaussian")
    if name == "oft":
        return FittedOFTConfig(target_modules=targets, oft_block_size=32)
    if name == "boft":
        return BOFTConfig(target_modules=targets, boft_block_size=4, boft_n_butterfly_factor=1)
    if name == "hra":
        return HRAConfig(target_modules=targets, r=rank)
    if name == "vera":
        return VeraConfig(target_modules=targets, r=rank)
    return EtherConfig(target_modules=targets, method=name, num_blocks=options.num_blocks)
