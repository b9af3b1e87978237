"""How one run is spread over processes: what each of them holds, and who averages gradients and steps.

Three layouts, chosen by the configuration of `accelerate launch`:

- replicated: every process holds everything, and gradients are averaged (DDP);
- sharded: each process of a machine holds a part of the frozen denoiser (FSDP2), and all of what is trained;
- partitioned: each process holds a part of the optimiser's state and of the gradients (ZeRO-2), and all weights.

In all three every process has all of what is trained, so saving, averaging and generating need no gathering. For the
last two Accelerate is told of processes and precision alone. Its own FSDP would shard trained vectors of a few hundred
numbers each, and gather them again for every step and checkpoint; and it takes neither mode on the CPU, where this
module runs, and is tested, as on GPUs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ether_diffusion.errors import InputError
from ether_diffusion.training.methods.injection import Configs
from ether_diffusion.training.options import OptimizationOptions, TrainingOptions
from ether_diffusion.tuner.shared_factors import ModelFactors

Layout = Literal["replicated", "sharded", "partitioned"]

SWITCHES: dict[str, Layout] = {"ACCELERATE_USE_FSDP": "sharded", "ACCELERATE_USE_DEEPSPEED": "partitioned"}
"""Variables by which `accelerate launch` hands on what its configuration asks for."""
SETTINGS = {
    "sharded": {
        "FSDP_VERSION": ("fsdp_version", "2"),
        "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "false"),
        "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "false"),
    },
    "partitioned": {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("zero_stage", "2"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("offload_optimizer_device", "none"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("offload_param_device", "none"),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("deepspeed_config_file", "none"),
    },
}
"""Settings of the launcher's configuration, their names in it, and the one value that fits."""


def claim_layout() -> Layout:
    """The layout that the launcher asks for; from then on, all libraries take the run for a data parallel one.

    Call it before an accelerator is made and before weights are read: transformers, too, reads the launcher's
    variables, and would leave the weights of all processes but the first empty.

    Raises:
        InputError: a setting that this training does not have; names it and what fits.
    """
    claimed = [layout for name, layout in SWITCHES.items() if os.environ.pop(name, "").lower() == "true"]
    if not claimed:
        return "replicated"
    for variable, (name, fits) in SETTINGS[claimed[0]].items():
        if (value := os.environ.get(variable, fits)).lower() != fits:
            raise InputError(f"{name}: {value} in the configuration of `accelerate launch`, needs {fits}")
    return claimed[0]


def check_layout(layout: Layout, options: TrainingOptions, configs: Configs, *, denoiser: str, precision: str) -> None:
    """Make sure that what is trained can be trained in this layout.

    Args:
        configs: component -> config of its adapter, or None for all weights.
        denoiser: name of the component that would be sharded.
        precision: no, fp16 or bf16.

    Raises:
        InputError: it cannot; says which configuration or flag fits.
    """
    if layout == "sharded":
        if configs.get(denoiser, ()) is None:
            raise InputError(
                "--method full: leaves no frozen weights to shard with FSDP; launch with configs/deepspeed_zero2.yaml"
            )
        if any(getattr(config, "use_dora", False) for config in configs.values()):
            raise InputError(
                "--adapter_config: use_dora reads entire weights, which FSDP shards; launch with configs/ddp.yaml"
            )
        if options.performance.compile:
            raise InputError(
                "--compile: FSDP shards the blocks that it would compile; drop it, or launch with configs/ddp.yaml"
            )
    if layout == "partitioned":
        if not configs or any(config is not None for config in configs.values()):
            raise InputError(
                "--method: ZeRO-2 divides the optimiser's state, which adapters have little of; needs full, or launch "
                "with configs/ddp.yaml or configs/fsdp.yaml"
            )
        if options.optimization.optimizer != "adamw" or options.optimization.use_8bit_adam:
            given = "--use_8bit_adam" if options.optimization.use_8bit_adam else "--optimizer prodigy"
            raise InputError(f"{given}: needs undivided parameters, which ZeRO-2 divides; only --optimizer adamw fits")
        if precision == "fp16":
            raise InputError(
                "--mixed_precision fp16: under ZeRO-2, trained weights would be kept in 16 bits; needs bf16 or no"
            )
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError("DeepSpeed, which the launcher asks for, is not installed; pip install deepspeed")


# The frozen denoiser in parts -----------------------------------------------------------------------------------


def shard_frozen(model: nn.Module, accelerator: Accelerator) -> None:
    """Freeze a model and leave each process of a machine a part of its weights; blocks are gathered when they run.

    Call it while the model is on the CPU, so that no device ever holds all of it, and before adapters are added: FSDP
    looks after the weights that it finds, so what is added later is not sharded. The processes must call the model in
    lockstep from then on. Over several machines each one holds all of the weights: they never cross the network.
    """
    model.requires_grad_(False)
    mesh = _mesh_of_machine(accelerator)
    blocks = {*(getattr(model, "_no_split_modules", None) or ()), *(getattr(model, "_repeated_blocks", None) or ())}
    for module in reversed(list(model.modules())):  # the inner ones first: a block holds what no inner block does
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def gathered(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """A context in which the main process has all weights of a sharded model, in the CPU's memory.

    Entered by every process, since all of them give their parts; on leaving, the model is sharded as before. A model
    that is not sharded stays as it is.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the outermost weights stay gathered from one call to the next
    parts: list[tuple[nn.Module, str, DTensor]] = []
    try:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if isinstance(parameter, DTensor):
                    full = parameter.full_tensor()
                    if accelerator.is_main_process:
                        parts.append((module, name, parameter))
                        module._parameters[name] = nn.Parameter(full.cpu(), requires_grad=False)
        yield
    finally:
        for module, name, parameter in parts:
            module._parameters[name] = parameter


def _mesh_of_machine(accelerator: Accelerator) -> DeviceMesh:
    processes = accelerator.num_processes
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes % local:  # machines with different numbers of processes
        local = processes
    # By the name "fsdp" PEFT knows that layers compute with all of their weights, whatever part is stored here.
    names = ("machine", "fsdp")
    return init_device_mesh(accelerator.device.type, (processes // local, local), mesh_dim_names=names)["fsdp"]


# Gradients and steps --------------------------------------------------------------------------------------------


class Replicated:
    """An objective and its optimiser in the layout "replicated", on one process or many.

    Attributes:
        model: what is called with global sample indices; holds the objective.
        parameters: what is trained.
        divides_optimizer: whether each process has a part of the optimiser's state.
    """

    divides_optimizer = False

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: OptimizationOptions,
    ):
        self.accelerator, self.options = accelerator, options
        self.parameters: list[nn.Parameter] = [each for group in optimizer.param_groups for each in group["params"]]
        self.factors = ModelFactors(objective)
        self._prepare(objective, optimizer)

    def _prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = self.accelerator.prepare(objective, optimizer)

    def restored(self) -> None:
        """To be called when something else has written to the parameters."""

    def accumulate(self, samples: Sequence[int]) -> Tensor:
        """Add the gradients of these samples' mean loss to those of the step, and return that loss, detached."""
        with self.accelerator.accumulate(self.model), self.factors.shared():
            loss = self.model(samples).mean()
            self.accelerator.backward(loss)
        return loss.detach()

    def step(self) -> bool:
        """Clip, step and forget the gradients; whether the step was taken (fp16 skips one that overflows)."""
        self.accelerator.unscale_gradients()
        # Many small vectors: one operation for all in place of a few for each, on the CPU, too.
        nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return not self.accelerator.optimizer_step_was_skipped


class Sharded(Replicated):
    """As `Replicated`, around a denoiser that was sharded: what is trained is not sharded, and averaged here.

    DDP would send the frozen weights around as well. What is trained beside them is small: one exchange a step.
    """

    def _prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        # "Evaluation" means no DDP; autocast is put around the objective all the same.
        self.model = self.accelerator.prepare_model(objective, device_placement=False, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def step(self) -> bool:
        gradients = [each.grad for each in self.parameters if each.grad is not None]
        vector_to_parameters(self.accelerator.reduce(parameters_to_vector(gradients), reduction="mean"), gradients)
        return super().step()


class Partitioned(Replicated):
    """The layout "partitioned": DeepSpeed's engine averages, clips and steps, each process its part of everything.

    The weights are float32 and complete on every process after each step; DeepSpeed keeps a second copy of its part.
    """

    divides_optimizer = True

    def _prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        import deepspeed  # an extra, and slow to import

        options, self._parts = self.options, 0
        objective = self.accelerator.prepare_model(objective, evaluation_mode=True)  # autocast, no DDP
        config = {
            "train_micro_batch_size_per_gpu": options.train_batch_size,
            "gradient_accumulation_steps": options.gradient_accumulation_steps,
            "gradient_clipping": options.max_grad_norm,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        }
        self.model, self.optimizer, _, _ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)

    def restored(self) -> None:
        self.optimizer.refresh_fp32_params()

    def accumulate(self, samples: Sequence[int]) -> Tensor:
        loss = self.model(samples).mean()
        self.model.backward(loss)  # divides by the number of parts
        self._parts += 1
        if self._parts < self.options.gradient_accumulation_steps:
            self.model.step()  # counts
        return loss.detach()

    def step(self) -> bool:
        self.model.step()
        self._parts = 0
        return True


LAYOUTS: dict[Layout, type[Replicated]] = {
    "replicated": Replicated,
    "sharded": Sharded,
    "partitioned": Partitioned,
}
