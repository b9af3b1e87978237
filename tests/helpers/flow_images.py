"""Small images of the pipelines in `flow_zoo`."""

import inspect

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline
from PIL import Image

from ether_diffusion.control.pipelines import stock_class


def generate(pipe: DiffusionPipeline, **options) -> np.ndarray:
    """An image of a pipeline, always from the same noise; of an editor, of a red square."""
    known = inspect.signature(stock_class(pipe).__call__).parameters
    usual = {"max_sequence_length": 32, "use_resolution_binning": False}
    usual |= {"system_prompt": "", "complex_human_instruction": None}  # they would leave no room for the prompt
    if isinstance(pipe, FluxKontextPipeline):
        usual |= {"image": Image.new("RGB", (32, 32), "red"), "max_area": 32 * 32, "_auto_resize": False}
    usual |= {"height": 32, "width": 32, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    fitting = {name: value for name, value in usual.items() if name in known}
    return pipe(prompt="a dog", output_type="np", **{**fitting, **options}).images[0]
