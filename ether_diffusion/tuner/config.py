"""What an ETHER adapter is: its method, its blocks, and the layers that carry it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig


class EtherType(str):
    """PEFT's type tag of this method, made like the members of PEFT's own enum of strings.

    Callers ask for `.value`, or cut the name from `str`, which reads "PeftType.ETHER".
    """

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


ETHER = EtherType("ETHER")
METHOD_NAMES = {"ether": "ETHER", "ether_plus": "ETHER+"}
"""What its methods are called in text."""


@dataclass
class EtherConfig(PeftConfig):
    """Configuration of an ETHER adapter.

    Args:
        method: "ether": `W H` with one reflection `H = I − 2ûûᵀ` per block. "ether_plus": `H̃⁺ W H⁺` with
            `H⁺ = I − ûûᵀ + v̂v̂ᵀ`.
        num_blocks: n, the number of equal blocks of each transformed dimension; has to divide it.
        sides: "input" or "both". Default: "input" for ETHER (the only side it has), "both" for ETHER+.
        target_modules: names (endings) of the layers to adapt, a regular expression, or "all-linear". Default: by
            architecture, the attention projections.
        exclude_modules: names, or a regular expression, of layers to leave out.
        modules_to_save: modules that are trained and saved whole beside the adapter.
        bias: "none", "all" or "ether_only": which biases are trained. A bias is never reflected.
        layers_to_transform: indices of the transformer layers to adapt; needs names in `target_modules`.
        layers_pattern: name of the list of layers that `layers_to_transform` counts in.
        init_weights: True starts ETHER at random directions and ETHER+ at the identity. False draws every vector at
            random, so that no adapter starts at the identity (for tests). All have length 1, which sets the scale of
            the learning rate.

    Raises:
        ValueError: a value that is not one of these.

    Source: ETHER, arXiv:2405.20271.
    """

    method: Literal["ether", "ether_plus"] = field(default="ether", metadata={"help": "ETHER or ETHER+"})
    num_blocks: int = field(default=1, metadata={"help": "blocks of each transformed dimension"})
    sides: Literal["input", "both"] | None = field(default=None, metadata={"help": "default: by method"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave out"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained whole"})
    bias: str = field(default="none", metadata={"help": "none, all or ether_only"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices of layers"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    init_weights: bool = field(default=True, metadata={"help": "start at the method's own start"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ETHER
        if self.method not in ("ether", "ether_plus"):
            raise ValueError(f"method={self.method!r}: choose 'ether' or 'ether_plus'")
        if self.sides is None:
            self.sides = "input" if self.method == "ether" else "both"
        if self.sides not in ("input", "both"):
            raise ValueError(f"sides={self.sides!r}: choose 'input' or 'both'")
        if self.method == "ether" and self.sides == "both":
            raise ValueError("sides='both' needs method='ether_plus': ETHER reflects the input side alone")
        if isinstance(self.num_blocks, bool) or not isinstance(self.num_blocks, int) or self.num_blocks < 1:
            raise ValueError(f"num_blocks={self.num_blocks!r}: a whole number of at least 1 is needed")
        if self.bias not in ("none", "all", "ether_only"):
            raise ValueError(f"bias={self.bias!r}: choose 'none', 'all' or 'ether_only'")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs a list of target_modules, not a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has a meaning only together with layers_to_transform")
