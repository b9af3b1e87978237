"""What the result of a run depends on, among the options that its checkpoints hold: not how things are spelled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ether_diffusion.training.options.data import BUCKETS, parse_buckets

MEMORY_ALONE = ("gradient_checkpointing", "pre_compute_text_embeddings")
"""Options that change no result, but are in checkpoints of earlier releases."""
MODELS = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "config_name_or_path",
    "controlnet_model_name_or_path",
)
UNSET = "default"
"""How checkpoints hold an option that was not given."""

_FINGERPRINT = re.compile(r"\(sha256:[0-9a-f]+\)$")
_STREAM = "stream of "


def dependence(run: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the result depends on, each as it counts; equal for runs with equal results.

    Options at their default are left out, so that one which an earlier release did not have makes no difference.

    run: name of the option -> value, as a checkpoint holds them.
    """
    values = {name: value for name, value in run.items() if name not in MEMORY_ALONE}
    for name in MODELS:
        if found := _FINGERPRINT.search(str(values.get(name, ""))):
            values[name] = found.group()  # of a local folder, what is in it, wherever it lies
            if name == MODELS[0]:
                values.pop("revision", None)  # only the Hub has revisions
    if values.pop("enable_xformers_memory_efficient_attention", False):
        values["attention_backend"] = "xformers"
    if values.get("center_crop"):
        values.pop("cache_latents", None)  # it fixes the places of crops, and these are all one
    if BUCKETS.test(buckets := str(values.get("aspect_ratio_buckets", UNSET))):
        values["aspect_ratio_buckets"] = parse_buckets(buckets)
    for name, value in values.items():
        if isinstance(value, str) and value.startswith(_STREAM):
            values[name] = os.path.normpath(value.removeprefix(_STREAM))
    return {name: value for name, value in values.items() if value is not False and value != UNSET}
