"""Layers that carry ETHER adapters: one implementation, for Linear and Conv2d alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ether_diffusion.tuner.base_layer import PLAIN_DTYPES, computes_as_written, offload_hook
from ether_diffusion.tuner.config import EtherConfig
from ether_diffusion.tuner.merging import MergingLayer
from ether_diffusion.tuner.mixed_batch import mixed_output
from ether_diffusion.tuner.operators import adapted_linear, displacement
from ether_diffusion.tuner.operators.shared import SharedFactors
from ether_diffusion.tuner.transforms import Vectors


class EtherLayer(MergingLayer):
    """An adapted layer: y = f_j(x) over the active adapters in the order of their activation, on a frozen base f_0.

    f_j(x) = (1 − α) f_{j−1}(x) + α H̃ f_{j−1}(Hx), the bias left as it is; so the weights compose to `W H_1 H_2 …`.
    The raw vectors are float32 whatever the base layer is (float64 on a float64 layer), unless `set_autocast` says
    that an adapter's are of the base layer's dtype.

    Strength: `scaling[name]` is what applies now, the adapter's strength (`set_scale`) times the factor of the call
    in progress (`scale_layer`, `unscale_layer`).
    """

    adapter_layer_names = ("ether_u", "ether_v", "ether_u_out", "ether_v_out")
    other_param_names = ("method", "num_blocks", "scaling", "strength", "autocast")
    channel_axis: int  # of inputs and outputs

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: EtherConfig,
        layer_name: str = "",
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.method: dict[str, str] = {}
        self.num_blocks: dict[str, int] = {}
        self.strength: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.autocast: dict[str, bool] = {}  # False: vectors in the base layer's dtype
        self.in_features, self.out_features = self._features(self.get_base_layer(), layer_name)
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True
        self.shared_factors: SharedFactors | None = None  # within `shared_factors.ModelFactors.shared`
        self._start_unmerged()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, layer_name, vectors)

    @staticmethod
    def _features(base: nn.Module, layer_name: str) -> tuple[int, int]:
        raise NotImplementedError

    # Adapters -------------------------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        config: EtherConfig,
        layer_name: str = "",
        vectors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter, at its start, or with copies of these vectors (by the names of `adapter_layer_names`).

        Raises:
            ValueError: `num_blocks` does not divide a transformed dimension; names the layer and the numbers that do.
        """
        n = config.num_blocks
        sides = {"": self.in_features} | ({"_out": self.out_features} if config.sides == "both" else {})
        for suffix, width in sides.items():
            if width % n:
                side = "output" if suffix else "input"
                fitting = ", ".join([str(k) for k in range(1, width + 1) if width % k == 0][:12])
                raise ValueError(
                    f"{layer_name or type(self).__name__}: num_blocks={n} does not divide the {side} dimension "
                    f"{width}; try {fitting}"
                )
        self.method[adapter_name], self.num_blocks[adapter_name] = config.method, n
        self.strength[adapter_name] = self.scaling[adapter_name] = 1.0
        self.autocast[adapter_name] = True
        for suffix, width in sides.items():
            if vectors is not None:
                for name in (f"ether_u{suffix}", f"ether_v{suffix}"):
                    if name in vectors:  # the caller's tensors, and a memory-mapped file, stay apart from the model
                        copied = vectors[name].detach().clone(memory_format=torch.contiguous_format)
                        getattr(self, name)[adapter_name] = nn.Parameter(copied, requires_grad=False)
                continue
            u = _random_directions(n, width // n)
            getattr(self, f"ether_u{suffix}")[adapter_name] = nn.Parameter(u)
            if config.method == "ether_plus":
                v = -u if config.init_weights else _random_directions(n, width // n)
                getattr(self, f"ether_v{suffix}")[adapter_name] = nn.Parameter(v.clone())
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if vectors is None:  # else whoever loads them says what is active
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's vectors; PEFT activates another where it was active."""
        super().delete_adapter(adapter_name)
        for name in self.adapter_layer_names:
            if (hook := offload_hook(getattr(self, name))) is not None:
                hook.original_devices.pop(adapter_name, None)  # else it looks for the vector when it is taken off

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device of the base layer, but, unless asked otherwise, in float32: half precision loses too much."""
        base_device, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None:
            hook = offload_hook(self.get_base_layer())  # the base layer is on the meta device between its calls
            device = base_device if hook is None else torch.device(hook.execution_device)
        if adapter_name not in self.ether_u:  # diffusers and PEFT ask every layer, whosever the adapter is
            return
        follows = base_dtype == torch.float64 or not self.autocast[adapter_name] and base_dtype in PLAIN_DTYPES
        dtype = base_dtype if follows else torch.float32
        for name in self.adapter_layer_names:
            vectors = getattr(self, name)
            if adapter_name in vectors and vectors[adapter_name].device.type != "meta":
                old = vectors[adapter_name]
                vectors[adapter_name] = nn.Parameter(old.detach().to(device, dtype), requires_grad=old.requires_grad)

    def set_autocast(self, adapter_name: str, autocast: bool) -> None:
        """Keep an adapter's vectors in float32 (True, the default), or in the base layer's dtype, if that is plain.

        PEFT's `autocast_adapter_dtype`. Reflections are computed in float32 in either case.
        """
        if not (autocast and self.autocast[adapter_name]):  # a vector that was filled since may have to be cast again
            self.autocast[adapter_name] = autocast
            self._move_adapter_to_device_of_base_layer(adapter_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EtherLayer:
        """Moved and cast as any module, but vectors become half precision (`model.half()`) only without autocast."""
        named = [(key, p) for name in self.adapter_layer_names for key, p in getattr(self, name).items()]
        exact = [(p.data, None if p.grad is None else p.grad.data) for _, p in named]
        super()._apply(fn, recurse)
        for (adapter_name, parameter), (data, grad) in zip(named, exact, strict=True):
            if torch.finfo(parameter.dtype).bits < (32 if self.autocast[adapter_name] else 16):
                parameter.data = data.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
        return self

    def vectors(self, adapter_name: str) -> Vectors:
        """The raw vectors of an adapter. Offloaded ones come as copies, on the device where the layer computes."""
        # Past the slow access to a module's attributes and to a ParameterDict's items: this runs at every call.
        return Vectors(*[_present(self._modules[name], adapter_name) for name in self.adapter_layer_names])

    def _own(self, adapter_names: list[str]) -> list[str]:
        return [name for name in adapter_names if name in self.ether_u]

    @property
    def acting_adapters(self) -> list[str]:
        """The adapters that change the output, in the order in which they do."""
        return [] if self.disable_adapters else [n for n in self._own(self.active_adapters) if self.scaling[n] != 0]

    # Strength -------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength α, and end the factor of a call in progress.

        Diffusers ends a call with scale 0 by setting every scale to 1; that leaves the strength as it was.
        """
        if adapter not in self.ether_u:
            return
        ends_zeroed_call = self.scaling[adapter] == 0 and self.strength[adapter] != 0 and scale == 1.0
        if not ends_zeroed_call:
            self.strength[adapter] = float(scale)
        self.scaling[adapter] = self.strength[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply what applies now by `scale`, for the active adapters.

        Raises:
            ValueError: no finite number.
        """
        if not _is_finite(scale):
            raise ValueError(f"scale={scale!r}: a finite number fits")
        for name in self._own(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; without a number, all of them."""
        for name in self._own(self.active_adapters):
            # Diffusers also ends the call that `scale_layer` has refused to begin.
            restored = self.scaling[name] / scale if _is_finite(scale) and scale else self.strength[name]
            # Pipelines scale and unscale at every step; rounding must not add up.
            unscaled = math.isclose(restored, self.strength[name], rel_tol=1e-12)
            self.scaling[name] = self.strength[name] if unscaled else restored

    # What stock LoRA calls look for on every PEFT layer: an ETHER layer holds no LoRA factors.

    @property
    def r(self) -> dict[str, int]:
        return dict(self.num_blocks)

    @property
    def lora_A(self) -> dict:
        return {}

    @property
    def lora_B(self) -> dict:
        return {}

    # Forward --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted layer on x, in the dtype of the base layer's own output.

        With `adapter_names`, PEFT's batches of mixed adapters, each row of x has the adapter named for it alone; see
        `mixed_batch.mixed_output`.
        """
        if kwargs.get("adapter_names") is not None:
            return mixed_output(self, x, args, **kwargs)
        if self.merged:
            return self._merged_output(x, args, kwargs)
        return self._adapted_output(x, [(name, self.scaling[name]) for name in self.acting_adapters], args, kwargs)

    def _adapted_output(self, x: Tensor, adapters: list[tuple[str, float]], args: tuple, kwargs: dict) -> Tensor:
        """f_j(x): one operator over a plain linear layer; else, what goes in and what comes out is reflected.

        adapters: names and strengths, none of them 0.
        """
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        *earlier, (name, strength) = adapters
        vectors = self.vectors(name)
        if not earlier and not args and not kwargs and computes_as_written(self.base_layer, x):
            weight, shared = self.base_layer.weight, None
            if not is_compiling() and self.shared_factors is not None and self.shared_factors.fit(weight, vectors):
                shared = self.shared_factors
            return adapted_linear(x, weight, self.base_layer.bias, vectors, strength, shared=shared)
        displaced = self._displaced(x, vectors.u, vectors.v)
        if vectors.u_out is None:
            return self._adapted_output((x + strength * displaced).to(x.dtype), earlier, args, kwargs)
        y = self._adapted_output((x + displaced).to(x.dtype), earlier, args, kwargs)
        # The output side reflects the product alone: the bias is no part of the weight.
        product = y - self._bias_under(x, y, args, kwargs)
        full = y + self._displaced(product, vectors.u_out, vectors.v_out)
        if strength == 1:
            return full.to(y.dtype)
        # Strength mixes outputs, not the two sides: W(α) is linear in α.
        unchanged = self._adapted_output(x, earlier, args, kwargs)
        return (unchanged + strength * (full - unchanged)).to(y.dtype)

    def _bias_under(self, x: Tensor, y: Tensor, args: tuple, kwargs: dict) -> Tensor | float:
        """What the base layer adds to its product, broadcastable to y."""
        bias = getattr(self.get_base_layer(), "bias", None)
        if bias is None:
            return 0.0
        if bias.device.type == "meta":  # offloaded: there only while the layer itself runs
            return self.base_layer(torch.zeros_like(x[:1] if x.ndim > 1 else x), *args, **kwargs)
        return self._as_channels(bias.to(y.device, y.dtype))  # group offloading keeps it elsewhere

    def _displaced(self, x: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
        axis = self.channel_axis
        return displacement(x.movedim(axis, -1), u, v).movedim(-1, axis)

    @staticmethod
    def _as_channels(bias: Tensor) -> Tensor:
        return bias

    def __repr__(self) -> str:
        return f"ether.{super().__repr__()}"


def _present(vectors: nn.ParameterDict, adapter_name: str) -> Tensor | None:
    """A vector, fetched if it is offloaded: hooks fetch for a module's forward, which a ParameterDict has not."""
    vector = vectors._parameters.get(adapter_name)
    if vector is None or not vector.is_meta or (hook := offload_hook(vectors)) is None:
        return vector
    return hook.weights_map[adapter_name].to(hook.execution_device)


def _is_finite(scale: Any) -> bool:
    try:
        return math.isfinite(scale)  # of NumPy and tensors, too
    except TypeError:
        return False


def _random_directions(n: int, width: int) -> Tensor:
    """Directions drawn uniformly, of length 1: (n, width), from PyTorch's generator."""
    return nn.functional.normalize(torch.randn(n, width, dtype=torch.float32), dim=-1)


class EtherLinear(EtherLayer, nn.Module):
    """ETHER over a linear layer, quantised or not: inputs (..., i), outputs (..., o)."""

    channel_axis = -1

    @staticmethod
    def _features(base: nn.Module, layer_name: str) -> tuple[int, int]:
        return base.in_features, base.out_features


class EtherConv2d(EtherLayer, nn.Module):
    """ETHER over a convolution's channels, the same at every kernel position: inputs (…, i, h, w).

    Raises:
        ValueError: a grouped convolution, whose outputs see only a part of the inputs.
    """

    channel_axis = -3

    @staticmethod
    def _features(base: nn.Module, layer_name: str) -> tuple[int, int]:
        if base.groups != 1:
            raise ValueError(
                f"{layer_name or 'Conv2d'}: ETHER does not reflect grouped convolutions (groups={base.groups}); only "
                "groups=1 fits: exclude the layer"
            )
        return base.in_channels, base.out_channels

    @staticmethod
    def _as_channels(bias: Tensor) -> Tensor:
        return bias[:, None, None]
