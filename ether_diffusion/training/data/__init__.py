"""What is trained on: images with captions and perhaps control images, and the views that samples show of them."""

# ruff: noqa: F401 (what other modules import from here)

from ether_diffusion.training.data.examples import Example, Examples, ListedExamples
from ether_diffusion.training.data.images import TrainingImages
from ether_diffusion.training.data.reading import examples_of, find_examples, find_pairs
