"""Pictures as training and pipelines both take them: 8-bit RGB, and how they are brought to size."""

import numpy as np
from PIL import Image

INTERPOLATIONS = {"nearest": Image.Resampling.NEAREST, "lanczos": Image.Resampling.LANCZOS}
"""By their names in options and configs."""


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, transparency on white."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        values = np.asarray(image, dtype=np.float64)
        scale = 257.0 if values.max(initial=0.0) > 255 else 1.0
        return Image.fromarray((values / scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
