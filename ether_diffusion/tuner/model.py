"""ETHER as a PEFT tuner, and its registration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import ModelMixin
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ether_diffusion.tuner.config import ETHER, EtherConfig
from ether_diffusion.tuner.guards import check_separate, guard
from ether_diffusion.tuner.layer import EtherConv2d, EtherLayer, EtherLinear
from ether_diffusion.tuner.mixed_batch import adapters_by_row
from ether_diffusion.tuner.undo import restored_on_error

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
DENOISER_TARGETS: dict[str, str] = {
    # Fused projections of the single-stream blocks: queries, keys, values and the MLP in one layer.
    "Flux2Transformer2DModel": (
        r".*\.(to_q|to_k|to_v|to_out\.0)|.*single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    ),
}
"""Default targets of diffusers' models, by class name, where they differ from `ATTENTION`."""
CLIP_MODELS = ("clip", "clip_text_model", "clip_vision_model")
VISION_LANGUAGE_MODELS = ("qwen2_5_vl", "qwen3_vl", "mistral3")
LANGUAGE_ATTENTION = r".*language_model\..*\.(q|v)_proj"
"""What PEFT takes of language models, and not of the vision tower, which sees no prompt."""


class EtherModel(BaseTuner):
    """Puts ETHER on the targeted layers of a model.

    Args:
        model: any module; its targets are Linear (quantised ones too) or Conv2d layers.
        config: an EtherConfig.
        adapter_name: default "default".
        low_cpu_mem_usage: create the vectors on the meta device, to be filled by loading.

    Raises:
        ValueError: no targets known for the architecture, no layer found, or blocks that do not fit (named).
        TypeError: a target that is neither, or whose forward is never called.

    Source: ETHER, arXiv:2405.20271.
    """

    prefix = "ether_"
    tuner_layer_cls = EtherLayer
    target_module_mapping = (
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        | dict.fromkeys(CLIP_MODELS, CLIP_ATTENTION)
        | dict.fromkeys(VISION_LANGUAGE_MODELS, LANGUAGE_ATTENTION)
    )

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's `inject_adapter`, of which nothing stays where it raises.

        It also does what `autocast_adapter_dtype=False` says, which PEFT leaves to its callers.
        """
        first = not hasattr(model, "peft_config")
        flag = (
            vars(model).pop("_hf_peft_config_loaded", None) if first else None
        )  # set already, where that is too soon
        with restored_on_error([model]):
            if flag is not None:
                model._hf_peft_config_loaded = flag
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            if not autocast_adapter_dtype:
                self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Vectors in float32, or with `autocast_adapter_dtype=False` in the dtype of the base layers."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.model.modules():
            if isinstance(layer, EtherLayer) and adapter_name in layer.ether_u:
                layer.set_autocast(adapter_name, autocast_adapter_dtype)

    def _prepare_adapter_config(self, peft_config: EtherConfig, model_config: dict) -> EtherConfig:
        if peft_config.target_modules is None:
            targets = self._default_targets(model_config)
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
        return peft_config

    def _prepare_model(self, peft_config: EtherConfig, model: nn.Module) -> None:
        """PEFT's last step before it changes the model."""
        every = peft_config.target_modules == "all-linear"  # PEFT makes names of it later
        check_separate(model, lambda path: every or bool(self._check_target_module_exists(peft_config, path)))
        guard(model)

    def _default_targets(self, model_config: dict) -> list[str] | str:
        kind = model_config.get("model_type")
        if isinstance(self.model, ModelMixin):  # a model of diffusers
            kind = type(self.model).__name__
            if kind in DENOISER_TARGETS:
                return DENOISER_TARGETS[kind]
            if any(name.endswith(f".{t}") for name, _ in self.model.named_modules() for t in ATTENTION):
                return ATTENTION
        elif kind in self.target_module_mapping:
            return self.target_module_mapping[kind]
        raise ValueError(
            f"no default layers are known for {type(self.model).__name__} (model type {kind!r}): "
            "pass target_modules, e.g. target_modules=['to_q', 'to_v'] or 'all-linear'"
        )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, EtherLayer):
            target.update_layer(adapter_name, peft_config, layer_name=current_key)
            return
        if isinstance(parent, nn.MultiheadAttention):
            raise TypeError(
                f"{current_key}: torch.nn.MultiheadAttention reads the weight past ETHER; exclude the layer"
            )
        layer = layer_class(target, current_key)(target, adapter_name, peft_config, layer_name=current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way to give every layer the adapter of each row, `adapter_names=["dog", "__base__"]`.

        Raises:
            ValueError: a name that no layer has, or a model in training mode.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names: batches of mixed adapters are for inference: call model.eval() first")
        with adapters_by_row(self.model, names, beams=kwargs.get("num_beams") or 1):
            yield


def layer_class(target: nn.Module, name: str) -> type[EtherLayer]:
    """The class of the ETHER layer over a layer, which may carry adapters of other methods.

    Raises:
        TypeError: neither a Linear (quantised ones count) nor a Conv2d; `name` says which layer.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, nn.Conv2d):
        return EtherConv2d
    if isinstance(base, nn.Linear) or (hasattr(base, "in_features") and hasattr(base, "out_features")):
        return EtherLinear
    raise TypeError(f"{name}: {type(base).__name__} cannot carry ETHER; only Linear and Conv2d can")


def register() -> None:
    """Make PEFT know ETHER: configs, tuners and state dicts of this method. Calling it again changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[ETHER] = EtherConfig
    PEFT_TYPE_TO_TUNER_MAPPING[ETHER] = EtherModel
    PEFT_TYPE_TO_PREFIX_MAPPING[ETHER] = EtherModel.prefix
