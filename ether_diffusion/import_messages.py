"""What libraries log about optional parts that are not there when they are imported, which helps no user here.

Each message is known by its logger and its beginning; everything else that these libraries have to say comes through.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

BEGINNINGS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
    "torchao": "Failed to load ",
    "torchao.kernel.intmm": "Warning: Detected no triton",
    # An image processor for torchvision whose twin for Pillow does the same.
    "transformers.utils.import_utils": "`",
}
"""Logger -> beginning of its messages."""
CONTAINED = {"transformers.utils.import_utils": "requires torchvision (not installed); falling back to"}
"""Logger -> what its messages contain besides."""


def _is_wanted(record: logging.LogRecord) -> bool:
    message = str(record.msg)
    starts = message.startswith(BEGINNINGS[record.name])
    return not (starts and CONTAINED.get(record.name, "") in message)


@contextlib.contextmanager
def without_import_messages() -> Iterator[None]:
    """A context in which these messages are dropped; on leaving it, the loggers are as they were."""
    loggers = [logging.getLogger(name) for name in BEGINNINGS]
    for logger in loggers:
        logger.addFilter(_is_wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_wanted)
