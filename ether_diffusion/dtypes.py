"""The floating-point dtypes by their names: torch's in flags of export, Accelerate's in flags of training."""

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""By torch's names."""

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By Accelerate's names of mixed precision."""
