"""The options of the training scripts, by topic. Flags are named as in the example scripts of diffusers."""

# ruff: noqa: F401 (what other modules import from here)

from ether_diffusion.training.options.base import OptionGroup, binding, flatten, groups_of, option
from ether_diffusion.training.options.command_line import OptionParser, parse_options
from ether_diffusion.training.options.control import (
    CONTROL_LEARNING_RATE,
    CONTROL_STEPS,
    NO_METHOD,
    ControlDataOptions,
    ControlTrainingOptions,
    ControlValidationOptions,
    parse_range,
)
from ether_diffusion.training.options.data import InstanceDataOptions, PriorOptions, ViewOptions, parse_buckets
from ether_diffusion.training.options.model import (
    DEFAULT_METHOD,
    ETHER_METHODS,
    LEARNING_RATES,
    METHODS,
    RANKED_METHODS,
    AdapterOptions,
    ModelOptions,
)
from ether_diffusion.training.options.noise import FlowOptions
from ether_diffusion.training.options.optimization import DEFAULT_STEPS, PRODIGY_LEARNING_RATE, OptimizationOptions
from ether_diffusion.training.options.performance import PerformanceOptions
from ether_diffusion.training.options.run import (
    SEEDS,
    VALIDATION_FOLDER,
    RunOptions,
    StateOptions,
    TrainingOptions,
    ValidationOptions,
)
