"""What training minimises: the denoising loss of images, with images of the class or control images beside them.

Axes: b samples, (c, h, w) latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ether_diffusion.control.encoder import CONTROL
from ether_diffusion.control.projection import inject
from ether_diffusion.training.data import TrainingImages
from ether_diffusion.training.data.views import Framing, View
from ether_diffusion.training.families import Family
from ether_diffusion.training.families.base import Conditioning
from ether_diffusion.training.seeds import generator

ENCODER, CONTROLNET = CONTROL, "controlnet"
REFERENCE, CONTROL_IMAGE, CONTROL_LATENTS = "reference", "control image", "control latents"
"""What the second image of a pair is for: seen as a reference, or control, as an image or as its latents."""

_KEPT_VIEWS = 512


def sample_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32: (b, c, h, w) twice to (b,).

    Raises:
        ValueError: the shapes differ; a broadcast would hide the mistake.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Sample:
    """What one prediction is asked about: latents and noise (c, h, w), and what goes with them.

    level: how noisy, as the family's noise has it.
    control: the control image (3, height, width), from 0 to 1, or its latents (c, h, w), or None.
    reference, seen: latents (c, h, w) of the reference image, and that image (3, height, width), from -1 to 1, where
        the text encoders read it; or None.
    """

    latents: Tensor
    noise: Tensor
    level: float
    prompt: str
    framing: Framing
    control: Tensor | None = None
    reference: Tensor | None = None
    seen: Tensor | None = None


class ImageSet:
    """Images as the objective draws samples from them.

    Args:
        images: the views.
        family: encodes them.
        seed: of all that is drawn: latents, noise and level of a sample follow from (seed, index) alone.
        noise_offset: size of a shift of each channel's noise.
        second: what the other image is for, where images come in pairs.
    """

    def __init__(
        self,
        images: TrainingImages,
        family: Family,
        *,
        seed: int,
        noise_offset: float = 0.0,
        second: str = REFERENCE,
    ):
        self.images, self.family, self.seed, self.noise_offset = images, family, seed, noise_offset
        self.second = second
        self._statistics: dict[tuple[View, bool], Tensor] = {}
        self._kept_views = _KEPT_VIEWS

    def load(self, index: int) -> None:
        """Read the files of sample number `index`. Raises `InputError` where they are damaged."""
        view = self.images.view(index)
        self.images.load(view, encoded=(view, False) in self._statistics)

    def draw(self, index: int) -> Sample:
        """Sample number `index`, on the device."""
        view, device = self.images.view(index), self.family.device
        latents = self.family.latents.draw(self._encode(view), generator(self.seed, "latents", index))
        draw = generator(self.seed, "noise", index)
        noise = torch.randn(latents.shape, generator=draw)
        if self.noise_offset:
            noise += self.noise_offset * torch.randn(len(noise), 1, 1, generator=draw)
        tokens = self.family.token_count(self.images.target(view.image))
        level = self.family.noise.draw(generator(self.seed, "timestep", index), tokens)
        return Sample(
            latents.to(device),
            noise.to(device),
            level,
            self.images.prompt(view, index),
            self.images.framing(view),
            **{name: each.to(device) for name, each in self._beside(view).items()},
        )

    def _beside(self, view: View) -> dict[str, Tensor]:
        """What a sample has of the image that goes with its image, if there is one."""
        if not self.images.has_seconds(view):
            return {}
        if self.second == CONTROL_IMAGE:
            return {"control": self.images.control(view)}
        latents = self.family.latents.draw(self._encode(view, second=True), None)
        if self.second == CONTROL_LATENTS:
            return {"control": latents}
        seen = {"seen": self.images.reference(view)} if self.family.reads_references else {}
        return {"reference": latents, **seen}

    @torch.no_grad()
    def _encode(self, view: View, second: bool = False) -> Tensor:
        """The autoencoder's answer for a view, kept: with few images and crops most views come back.

        Views are encoded one by one, so that the result does not depend on the batch.

        second: of the reference or control image instead.
        """
        key = (view, second)
        if key not in self._statistics:
            if len(self._statistics) >= self._kept_views:
                del self._statistics[next(iter(self._statistics))]
            pixels = self.images.reference(view) if second else self.images.pixels(view)
            with self.family.on_device("vae"):
                self._statistics[key] = self.family.latents.encode(pixels)
        return self._statistics[key]

    def encode_all(self) -> None:
        """Encode every view that can come; needs images with fixed or central crops. They are kept on the CPU."""
        views = [(view, False) for view in self.images.all_views()]
        if self.second != CONTROL_IMAGE:
            views += [(view, True) for view, _ in views if self.images.has_seconds(view)]
        self._kept_views = len(views)
        with self.family.on_device("vae"):
            for view, second in views:
                self._statistics[view, second] = self._encode(view, second).cpu()

    def prompts(self) -> dict[tuple[str, View | None], list[Tensor] | None]:
        """Every prompt that can come, with the reference image that is read beside it, where one is.

        Needs images with fixed or central crops where there are reference images.
        """
        if not self.family.reads_references:
            return dict.fromkeys((prompt, None) for prompt in self.images.prompts)
        return {
            (prompt, view): [self.images.reference(view)]
            for view in self.images.all_views()
            for prompt in self.images.captions(view)
        }


class DenoisingObjective(nn.Module):
    """Denoise images under their prompts: weight(t) · |target − prediction|², mean over the latent's elements.

    With images of a class besides, the loss of a sample is that of an image plus `prior_loss_weight` times that of a
    class image (prior preservation; source: DreamBooth, arXiv:2208.12242, section 3.2).

    A module, so that one wrapper (precision, data parallel) holds all that is trained. `forward` takes the global
    indices of the samples; each draws its crop, mirroring, latents, noise and level from (seed, index) alone.

    Args:
        family: the pipeline's family; its components are on their device.
        images: what samples are drawn from: one set, or two, of which the second is of the class.
        trained: names of the components that are trained.
        beside: more that is trained and belongs to no component of the pipeline, by name.
        snr_gamma: γ of `DiscreteNoise.min_snr_weights`; None weighs all timesteps alike.
        prior_loss_weight: of the class images' loss.
    """

    def __init__(
        self,
        family: Family,
        images: Sequence[ImageSet],
        *,
        trained: Sequence[str],
        beside: Mapping[str, nn.Module] | None = None,
        snr_gamma: float | None = None,
        prior_loss_weight: float = 1.0,
    ):
        super().__init__()
        self.family, self.images = family, list(images)
        self.components = nn.ModuleDict({**{name: family.component(name) for name in trained}, **(beside or {})})
        self.snr_gamma, self.prior_loss_weight = snr_gamma, prior_loss_weight
        family.freeze_unused()

    def forward(self, samples: Sequence[int]) -> Tensor:
        """The loss of each sample: (b,), float32.

        samples: global indices of the samples, b of them.
        """
        drawn = [each.draw(sample) for each in self.images for sample in samples]
        own, *prior = self._losses(drawn).chunk(len(self.images))
        return own + self.prior_loss_weight * prior[0] if prior else own

    def load(self, samples: Sequence[int]) -> None:
        """Read the files of these samples, before anything is computed. Raises `InputError` where they are damaged."""
        for each in self.images:
            for sample in samples:
                each.load(sample)

    def _losses(self, drawn: Sequence[Sample]) -> Tensor:
        """The loss of each of these samples: (b,); one prediction for all that have one shape."""
        by_shape: dict[tuple[torch.Size, bool], list[int]] = {}
        for k, sample in enumerate(drawn):
            by_shape.setdefault((sample.latents.shape, sample.reference is None), []).append(k)
        parts = [self._losses_of_one_shape([drawn[k] for k in numbers]) for numbers in by_shape.values()]
        order = [k for numbers in by_shape.values() for k in numbers]
        return torch.cat(parts)[torch.tensor(order, device=parts[0].device).argsort()]

    def _losses_of_one_shape(self, drawn: Sequence[Sample]) -> Tensor:
        family = self.family
        latents, noise = (torch.stack(each) for each in zip(*((d.latents, d.noise) for d in drawn), strict=True))
        levels = torch.tensor([sample.level for sample in drawn], device=latents.device)
        noisy = family.noise.add(latents, noise, levels)  # (b, c, h, w)
        prompts = self._condition(drawn)
        framings = family.encode_framings([sample.framing for sample in drawn])
        conditioning = [{**prompt, **framing} for prompt, framing in zip(prompts, framings, strict=True)]
        prediction = self._predict(noisy, levels, conditioning, drawn)
        losses = sample_losses(prediction, family.noise.target(latents, noise, levels))
        return losses if self.snr_gamma is None else losses * family.noise.min_snr_weights(levels, self.snr_gamma)

    def _predict(
        self, noisy: Tensor, levels: Tensor, conditioning: Sequence[Conditioning], drawn: Sequence[Sample]
    ) -> Tensor:
        """The denoiser's answer for these samples."""
        references = {}
        if drawn[0].reference is not None:
            references["references"] = [torch.stack([sample.reference for sample in drawn])]
        return self.family.predict(noisy, levels, conditioning, **references)

    def _condition(self, drawn: Sequence[Sample]) -> list[Conditioning]:
        """The encoded prompts; kept where no text encoder is trained."""
        family, prompts = self.family, [sample.prompt for sample in drawn]
        if not any(name in self.components for name in family.text_encoders):
            seen = [[sample.seen] for sample in drawn] if family.reads_references else None
            return family.conditioning(family.as_trained(prompts), seen)
        with family.on_device(*family.text_encoders):
            return family.encode_prompts(prompts)


class LightControlObjective(DenoisingObjective):
    """Denoise with the features that an encoder makes of the control images, added after the first projection.

    The encoder is the component `control_encoder`.

    Source: ETHER, arXiv:2405.20271, section 5.1.2, after OFT, arXiv:2306.07280.
    """

    def _predict(
        self, noisy: Tensor, levels: Tensor, conditioning: Sequence[Conditioning], drawn: Sequence[Sample]
    ) -> Tensor:
        features = self.components[ENCODER](control_images(drawn))
        with inject(self.family.component(self.family.denoiser), features):
            return super()._predict(noisy, levels, conditioning, drawn)


class ControlNetObjective(DenoisingObjective):
    """Denoise with a frozen denoiser, to whose activations a ControlNet, the component `controlnet`, adds.

    Source: ControlNet, arXiv:2302.05543.
    """

    def _predict(
        self, noisy: Tensor, levels: Tensor, conditioning: Sequence[Conditioning], drawn: Sequence[Sample]
    ) -> Tensor:
        controlnet = self.components[CONTROLNET]
        residuals = self.family.residuals(controlnet, noisy, levels, conditioning, control_images(drawn))
        return self.family.predict(noisy, levels, conditioning, **residuals)


def control_images(drawn: Sequence[Sample]) -> Tensor:
    """The control images of samples, (b, 3, height, width), or their latents (b, c, h, w)."""
    return torch.stack([sample.control for sample in drawn])
