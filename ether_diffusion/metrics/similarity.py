"""Similarity of images to a subject, to words, to what the base model generated, and to each other.

Similarities are cosines of the features that a frozen network gives. Each network has its own scale: numbers of
different networks are not comparable.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from ether_diffusion.images import to_bytes

DINO, DINOV2, CLIP = "facebook/dino-vits16", "facebook/dinov2-small", "openai/clip-vit-base-patch32"
LPIPS_NETS = ("alex", "vgg", "squeeze")
BATCH = 32

# Axes: n images, h and w pixels, d features.

# Features -------------------------------------------------------------------------------------------------------


class ImageFeatures(Protocol):
    """Names what an image shows by a direction."""

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any size -> features of length 1, (n, d), float32, on the CPU."""
        ...


class TextImageFeatures(ImageFeatures, Protocol):
    """Has directions for words in the same space."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Prompts -> features of length 1, (n, d), float32, on the CPU."""
        ...


class _Extractor:
    """A frozen network and its image processor, some images or prompts at a time."""

    model_class: type = AutoModel

    def __init__(self, model_id: str, *, device: torch.device | str = "cpu", batch_size: int = BATCH):
        self.model = self.model_class.from_pretrained(model_id).eval().to(device)
        # The processor on PIL needs no torchvision.
        self.processor = AutoImageProcessor.from_pretrained(model_id, backend="pil")
        self.batch_size = batch_size

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any size -> (n, d), length 1."""
        return self._in_batches(images, self._embed_images)

    @torch.no_grad()
    def _in_batches(self, items: Sequence[Any], embed: Callable[[Sequence[Any]], Tensor]) -> Tensor:
        starts = range(0, len(items), self.batch_size)
        return F.normalize(torch.cat([embed(items[k : k + self.batch_size]).float().cpu() for k in starts]), dim=-1)

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return self.processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values


class ClassTokenFeatures(_Extractor):
    """The class token after the last norm of a vision transformer such as DINO (ViT-S/16) or DINOv2.

    Args:
        model_id: as `from_pretrained` takes it; the folder holds the image processor as well.
        device, batch_size: where it computes, and how many images at a time.
    """

    def __init__(self, model_id: str = DINO, *, device: torch.device | str = "cpu", batch_size: int = BATCH):
        super().__init__(model_id, device=device, batch_size=batch_size)

    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        return self.model(pixel_values=self._pixels(images).to(self.model.device)).last_hidden_state[:, 0]


class ClipFeatures(_Extractor):
    """Both towers of a CLIP: images and prompts in one space.

    Args:
        model_id: as `from_pretrained` takes it; the folder holds image processor and tokenizer as well.
        device, batch_size: where it computes, and how many images or prompts at a time.
    """

    model_class = CLIPModel

    def __init__(self, model_id: str = CLIP, *, device: torch.device | str = "cpu", batch_size: int = BATCH):
        super().__init__(model_id, device=device, batch_size=batch_size)
        self.tokenizer = AutoTokenizer.from_pretrained(model_id)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Prompts -> (n, d), length 1; what is longer than the tower reads is cut."""
        return self._in_batches(texts, self._embed_texts)

    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        pooled = self.model.vision_model(pixel_values=self._pixels(images).to(self.model.device)).pooler_output
        return self.model.visual_projection(pooled)

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        # Attention is causal and the end of the text is what is pooled: padding after it changes nothing.
        ids = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return self.model.text_projection(self.model.text_model(input_ids=ids.to(self.model.device)).pooler_output)


def load_features(
    model_id: str, *, device: torch.device | str = "cpu", batch_size: int = BATCH
) -> ClassTokenFeatures | ClipFeatures:
    """The extractor that fits a model, a folder or an id on the Hub: CLIP's two towers, or the class token."""
    kind = ClipFeatures if AutoConfig.from_pretrained(model_id).model_type == "clip" else ClassTokenFeatures
    return kind(model_id, device=device, batch_size=batch_size)


# Figures --------------------------------------------------------------------------------------------------------


def image_similarity(
    images: Sequence[Image.Image], references: Sequence[Image.Image], features: ImageFeatures
) -> float:
    """Mean cosine over all pairs of n images x and m references r: 1/(n m) Σ_ij f(x_i)·f(r_j), from −1 to 1.

    CLIP-I with the features of CLIP, "DINO" with those of DINO. Source: arXiv:2208.12242, section 4.

    references: such as the photographs of the subject. features: f, with |f| = 1.

    Raises:
        ValueError: no images or no references.
    """
    counts = f"{len(images)} images and {len(references)} references"
    if not len(images) or not len(references):
        raise ValueError(f"image_similarity: got {counts}, needs one of each")
    return (features.embed_images(images) @ features.embed_images(references).T).mean().item()


def text_similarity(images: Sequence[Image.Image], prompts: Sequence[str], features: TextImageFeatures) -> float:
    """Mean cosine of each image x with its own prompt p (CLIP-T): 1/n Σ_k f(x_k)·g(p_k), with |f| = |g| = 1.

    features: f and g.

    Raises:
        ValueError: no images, or another number of prompts.
    """
    _check_pairs("text_similarity", images, prompts, "prompts")
    return (features.embed_images(images) * features.embed_texts(prompts)).sum(-1).mean().item()


def drift(images: Sequence[Image.Image], base_images: Sequence[Image.Image], features: ImageFeatures) -> float:
    """How far images x have moved from those of the base model, b: 1/n Σ_k (1 − f(x_k)·f(b_k)), from 0 to 2.

    Measured on prompts without the subject, it is what training changed that it should not have; 0 where nothing did.

    base_images: for the same prompts and seeds. features: f, with |f| = 1.

    Raises:
        ValueError: no images, or another number of them.
    """
    _check_pairs("drift", images, base_images, "images of the base model")
    cosines = (features.embed_images(images) * features.embed_images(base_images)).sum(-1)
    return 1 - cosines.mean().item()


def _check_pairs(where: str, images: Sequence[object], others: Sequence[object], named: str) -> None:
    if not len(images) or len(images) != len(others):
        raise ValueError(f"{where}: got {len(images)} images and {len(others)} {named}, needs one for each")


class Lpips:
    """LPIPS, the perceptual distance of arXiv:1801.03924, by torchmetrics, with its trained weights.

    The network itself, one of LPIPS_NETS, comes from torchvision, which downloads it at the first use.

    Raises:
        ImportError: torchmetrics or torchvision is missing.
        ValueError: another net.
    """

    def __init__(self, net: str = "alex", *, device: torch.device | str = "cpu"):
        if net not in LPIPS_NETS:
            raise ValueError(f"LPIPS: got the net {net!r}, needs one of {', '.join(LPIPS_NETS)}")
        try:
            import torchvision  # noqa: F401  (torchmetrics asks for it late, in words of its own)
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        except ImportError as error:
            raise ImportError(
                f'LPIPS: {error}; it needs torchmetrics and torchvision: pip install "ether-diffusion[eval]"'
            ) from error
        self.metric = LearnedPerceptualImagePatchSimilarity(net_type=net, reduction="none").to(device)

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Two batches (n, 3, h, w), values from −1 to 1 -> the distance of each pair, (n,), on the CPU."""
        return self.metric(first.to(self.metric.device), second.to(self.metric.device)).reshape(-1).cpu()


def diversity(
    groups: Sequence[Sequence[Image.Image]],
    *,
    distance: str | Callable[[Tensor, Tensor], Tensor] = "alex",
    device: torch.device | str = "cpu",
    batch_size: int = BATCH,
) -> float:
    """Mean distance of the images of one prompt from each other: the mean over groups of mean_{i<j} D(x_i, x_j).

    Args:
        groups: the images of each prompt, at least two of one size.
        distance: D: a net of `Lpips`, or a callable that takes two batches (n, 3, h, w) with values from −1 to 1 and
            gives (n,).
        device: where a net computes.
        batch_size: pairs at a time.

    Raises:
        ImportError: torchmetrics or torchvision is missing, for a net.
        ValueError: no groups, a group of fewer than two images or of several sizes, or an unknown net.
    """
    if not len(groups):
        raise ValueError("diversity: got no groups, needs the images of at least one prompt")
    for k, group in enumerate(groups):
        if len(group) < 2:
            raise ValueError(f"diversity: group {k} has {len(group)} images, needs two")
        if len(sizes := sorted({image.size for image in group})) > 1:
            raise ValueError(f"diversity: group {k} has images of {sizes}, needs one size")
    measure = Lpips(distance, device=device) if isinstance(distance, str) else distance
    means = []
    for group in groups:
        values = to_bytes(group).float() / 127.5 - 1  # (n, 3, h, w)
        first, second = torch.tensor(list(itertools.combinations(range(len(group)), 2))).T
        parts = [
            measure(values[i], values[j])
            for i, j in zip(first.split(batch_size), second.split(batch_size), strict=True)
        ]
        means.append(torch.cat(parts).double().mean().item())
    return sum(means) / len(means)
