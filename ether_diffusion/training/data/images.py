"""Training images: which part of which example each sample shows, under which prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

import torch
from PIL import Image

from ether_diffusion.images import INTERPOLATIONS, to_pixels
from ether_diffusion.training.data import views
from ether_diffusion.training.data.examples import Examples
from ether_diffusion.training.data.views import Framing, Size, Target, View, cut
from ether_diffusion.training.seeds import generator

_KEPT_EXAMPLES = 64


@dataclass(eq=False)
class TrainingImages:
    """Training views of examples, addressed by the global index of the sample.

    An epoch visits every example `repeats` times, in an order of its own; sample s belongs to epoch s // len(images).
    Of a stream, sample s is row s. The order, the place of the crop, the mirroring and the caption follow from
    (seed, s) alone; a control image gets the crop and the mirroring of its image.

    Args:
        examples: what is trained on.
        targets: (height, width) in pixels that a view can have; every image has the one whose aspect ratio is
            nearest to its own.
        center_crop: cut at the centre instead of at a random place.
        random_flip: mirror with probability one half.
        repeats: how often each example comes in an epoch.
        fixed_crops: one crop for each repeat of an image, the same in every epoch, so that there are few views.
        group_size: samples of one forward pass over all processes; where targets differ and the sizes of the images
            are known, the order keeps so many samples of one target together.
        interpolation: of control or reference images, "nearest" or "lanczos".
        proportion_empty_prompts: part of the samples without a prompt.
        seed: of the run.

    Attributes:
        fingerprint: of the examples.
    """

    examples: Examples
    _: KW_ONLY
    targets: Sequence[Target]
    center_crop: bool = False
    random_flip: bool = False
    repeats: int = 1
    fixed_crops: bool = False
    group_size: int = 1
    interpolation: str = "nearest"
    proportion_empty_prompts: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.fingerprint, self.resample = self.examples.fingerprint, INTERPOLATIONS[self.interpolation]
        self._example = lru_cache(maxsize=_KEPT_EXAMPLES)(self.examples.__getitem__)
        self._images = lru_cache(maxsize=_KEPT_EXAMPLES)(self._read)
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        """Samples in an epoch; of a stream, which has none, 1."""
        return 1 if self.examples.endless else len(self.examples) * self.repeats

    @property
    def prompts(self) -> list[str]:
        """Every prompt that can come."""
        captions = {caption for number in range(len(self.examples)) for caption in self.examples[number].captions}
        return sorted(captions | ({""} if self.proportion_empty_prompts else set()))

    def view(self, sample: int) -> View:
        """Which part of which image sample number `sample` shows."""
        number = sample
        if not self.examples.endless:
            epoch, place = divmod(sample, len(self))
            number = self._order(epoch)[place]
        flip = self.random_flip and bool(torch.rand((), generator=generator(self.seed, "flip", sample)) < 0.5)
        crop = generator(self.seed, *(("fixed crop", number) if self.fixed_crops else ("crop", sample)))
        return self._crop(number, crop, flip)

    def all_views(self) -> Iterator[View]:
        """Every view that can come, where crops are fixed or central."""
        for number in range(len(self)):
            for flip in (False, True)[: 1 + self.random_flip]:
                yield self._crop(number, generator(self.seed, "fixed crop", number), flip)

    def prompt(self, view: View, sample: int) -> str:
        """What the view is trained under: its caption, one drawn where it has several, or none by chance."""
        draw = generator(self.seed, "caption", sample)
        if float(torch.rand((), generator=draw)) < self.proportion_empty_prompts:
            return ""
        captions = self._example(view.image).captions
        return captions[int(torch.randint(len(captions), (), generator=draw))]

    def pixels(self, view: View) -> torch.Tensor:
        """The view as (3, height, width) of its target, float32, from -1 (black) to 1 (white)."""
        image, _, _ = self._images(view.image)
        return to_pixels(cut(image, view, self.target(view.image)))

    def captions(self, view: View) -> list[str]:
        """Every prompt under which the view can come."""
        return [*self._example(view.image).captions, *([""] if self.proportion_empty_prompts else [])]

    def has_seconds(self, view: View) -> bool:
        """Whether another image goes with the one of a view."""
        return self._example(view.image).control is not None

    def reference(self, view: View) -> torch.Tensor | None:
        """The view of the image that goes with it, as `pixels`; None where there is none."""
        if not self.has_seconds(view):  # so that no image is read whose latents are kept
            return None
        _, second, _ = self._images(view.image)
        return to_pixels(cut(second, view, self.target(view.image), self.resample))

    def control(self, view: View) -> torch.Tensor | None:
        """The control image's view as (3, height, width), float32, from 0 to 1; None where there is none."""
        pixels = self.reference(view)
        return None if pixels is None else pixels.add(1).div(2)

    def load(self, view: View, *, encoded: bool = False) -> None:
        """Read the files that a view needs; what was read last is kept.

        encoded: whether its latents are there already, so that it needs no image but a control image.

        Raises:
            InputError: files that are gone or damaged.
        """
        if not encoded or self._example(view.image).control is not None:
            self._images(view.image)

    def framing(self, view: View) -> Framing:
        """Size and crop of the view."""
        return views.frame(self._size(view.image), view, self.target(view.image))

    def target(self, image: int) -> Target:
        """(height, width) of the views of an image."""
        return views.nearest_target(self._size(image), self.targets)

    def _size(self, image: int) -> Size:
        sizes = self.examples.sizes
        return self._images(image)[2] if sizes is None else sizes[image]

    def _crop(self, number: int, draw: torch.Generator, flip: bool) -> View:
        """The view of a number of an epoch's order."""
        image = number if self.examples.endless else number % len(self.examples)
        place = None if self.center_crop else draw
        return views.place_view(image, self._size(image), self.target(image), place, flip=flip)

    def _read(self, number: int) -> tuple[Image.Image, Image.Image | None, Size]:
        """Image and control image, reduced for training to one size, and the size that the image had."""
        example = self._example(number)
        image, control = example.read(), None
        shrunk = views.shrink(image, views.nearest_target(image.size, self.targets))
        if example.control is not None:
            control = example.control.read()
            example.check_shape(image.size, control.size)
            if control.size != shrunk.size:
                control = control.resize(shrunk.size, self.resample)
        return shrunk, control, image.size

    def _shuffle(self, epoch: int) -> list[int]:
        """Number of the image, plus the count of images times number of the repeat, at each place of an epoch."""
        draw = generator(self.seed, "order", epoch)
        order = torch.randperm(len(self), generator=draw).tolist()
        if self.examples.sizes is None or len(self.targets) == 1:
            return order
        by_target: dict[Target, list[int]] = {}
        for number in order:
            by_target.setdefault(self.target(number % len(self.examples)), []).append(number)
        if len(by_target) == 1:
            return order
        full, partial = [], []
        for numbers in by_target.values():
            groups = [numbers[k : k + self.group_size] for k in range(0, len(numbers), self.group_size)]
            (full if len(groups[-1]) == self.group_size else partial).append(groups.pop())
            full += groups
        shuffled = [full[k] for k in torch.randperm(len(full), generator=draw)]
        # What is left over of each target comes last, so that it breaks no group before it.
        return [number for group in [*shuffled, *partial] for number in group]
