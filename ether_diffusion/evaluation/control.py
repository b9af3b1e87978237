"""How well a pipeline under control follows its control images: generate from each, score, compare with the base."""

import importlib.util
import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ether_diffusion import metrics
from ether_diffusion.base_models import MINIATURE as SHIPPED
from ether_diffusion.base_models import base_path, miniature_name, open_pipeline
from ether_diffusion.control.classes import CONTROL_PIPELINES
from ether_diffusion.control.controlnets import CONTROLNETS, controlnets_for, start_noise, with_controlnet
from ether_diffusion.control.encoder import CONTROL, read_encoder
from ether_diffusion.control.pipelines import denoiser_name, native_sides, over, stock_class
from ether_diffusion.errors import InputError
from ether_diffusion.evaluation.features import MiniatureFeatures
from ether_diffusion.evaluation.options import INCEPTION, MINIATURE, NO_FEATURES, UPERNET, ControlEvaluation
from ether_diffusion.evaluation.samples import IGNORED, Sample, held_out, read_samples
from ether_diffusion.files import checksum
from ether_diffusion.images import image_grid
from ether_diffusion.miniature.control_data import HELD_OUT
from ether_diffusion.miniature.segmenter import MiniatureSegmenter
from ether_diffusion.training.families import guidance_argument
from ether_diffusion.training.families.unet import latent_side
from ether_diffusion.training.methods.saving import load_trained
from ether_diffusion.training.options.control import parse_range
from ether_diffusion.training.options.run import GUIDANCE_SCALE
from ether_diffusion.training.seeds import generator

SHEET_COLUMNS, SHEET_SIDE = 12, 256


def evaluate(options: ControlEvaluation) -> tuple[dict[str, Any], Image.Image]:
    """Generate with control and without, and score both and the real images: a report of JSON values, and a sheet.

    Raises:
        InputError: data that cannot be used, or a package that is missing.
        ValueError: an adapter that does not fit, or a base for which there is no control.
        OSError: nothing there, or the Hub cannot be reached.
    """
    base = base_path(options.base or SHIPPED)
    features = options.fid_features or (INCEPTION if options.miniature is None else MINIATURE)
    pipe = _open(base, options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, options = _side(pipe, base), replace(options, guidance_scale=_guidance(pipe, options))
    samples = _samples(options, side)
    _check_features(features, len(samples))
    controlled, argument = _controlled(pipe, options)
    evaluator = make_evaluator(options, device)
    with_control = _generate(controlled.to(device), samples, options, argument)
    del pipe, controlled  # the adapter stays in their models, so the base is opened anew
    without = _generate(_open(base, options).to(device), samples, options)

    real = [sample.real for sample in samples]
    rows = {"real": real, "with_control": with_control, "without_control": without}
    truth = evaluator.truth(samples)
    scores: dict[str, dict[str, float | None]] = {}
    for name, images in rows.items():
        scores[name] = evaluator.scores(images, truth)
        if features != NO_FEATURES:
            extractor = MiniatureFeatures() if features == MINIATURE else features
            scores[name]["fid"] = None
            if images is not real:
                scores[name]["fid"] = metrics.frechet_distance(images, real, features=extractor, device=device)
    settings = ("num_inference_steps", "guidance_scale", "controlnet_conditioning_scale", "seed")
    report = {
        "base": base,
        "adapter": options.adapter,
        "data": str(options.data_dir) if options.data_dir else f"miniature, {HELD_OUT!r}",
        "count": len(samples),
        "settings": {name: getattr(options, name) for name in settings} | {"height": side, "width": side},
        "judge": evaluator.record,  # the key that reports have had from the start
        "fid_features": features,
        "scores": scores,
    }
    if shipped := miniature_name(base):
        report |= {"base": shipped, "base_sha256": checksum(Path(base))}
    return report, draw_sheet({"control": [sample.control for sample in samples], **rows})


def _samples(options: ControlEvaluation, side: int) -> list[Sample]:
    if options.miniature:
        return held_out(options.miniature, side)
    return read_samples(
        options.data_dir,
        side,
        most=options.max_samples,
        reduce_labels=options.reduce_labels,
        value_range=parse_range(options.conditioning_range),
        labels_from_colours=options.evaluator == MINIATURE,
    )


def _check_features(features: str, count: int) -> None:
    """Find out before generating what would keep the Fréchet distance from being computed."""
    if features == NO_FEATURES:
        return
    for package in ("torchmetrics", "torch_fidelity")[: 1 + (features == INCEPTION)]:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"--fid_features {features}: the package {package} is missing; pip install "
                f'"ether-diffusion[eval]", or --fid_features {NO_FEATURES}'
            )
    if count < 2:
        raise InputError(f"--fid_features {features}: got {count} image, needs two; {NO_FEATURES} leaves it out")


def draw_sheet(rows: dict[str, Sequence[Image.Image]]) -> Image.Image:
    """A grid of the first SHEET_COLUMNS images of each row, none larger than SHEET_SIDE pixels a side."""
    side = min(SHEET_SIDE, rows["control"][0].width)

    def small(name: str, image: Image.Image) -> Image.Image:
        # Nearest for control images, since a map's colours are classes.
        resample = Image.Resampling.NEAREST if name == "control" else Image.Resampling.LANCZOS
        return image.convert("RGB").resize((side, side), resample)

    return image_grid(
        [(name.replace("_", " "), [small(name, image) for image in row[:SHEET_COLUMNS]]) for name, row in rows.items()]
    )


# Generating -------------------------------------------------------------------------------------------------------


def _open(base: str, options: ControlEvaluation) -> DiffusionPipeline:
    pipe = open_pipeline(base, variant=options.variant, revision=options.revision)
    return _prepared(pipe, f"--base {base}")


def _prepared(pipe: DiffusionPipeline, given: str) -> DiffusionPipeline:
    """The pipeline, ready to generate without progress bars; `given`: the flag and value that it comes from."""
    if type(pipe).__name__ not in CONTROL_PIPELINES:
        raise InputError(f"{given}: is a {type(pipe).__name__}; control is for {', '.join(CONTROL_PIPELINES)}")
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # an image that it blackens would be scored
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _controlled(pipe: DiffusionPipeline, options: ControlEvaluation) -> tuple[DiffusionPipeline, str]:
    """The pipeline under control, and the argument of its calls that takes the control images."""
    folder = Path(options.adapter)
    name = type(pipe).__name__
    light, nets = CONTROL_PIPELINES[name], controlnets_for(name)
    found = {each: kind for each in (folder, folder / "controlnet") if (kind := _controlnet_class(each))}
    net = next(iter(found), None)
    if net is not None and (nets is None or nets.model_class.__name__ != found[net]):
        raise InputError(f"--adapter {net}: is a {found[net]}, which is not for a {name}")
    if net is not None:
        controlled = with_controlnet(pipe, nets.model_class.from_pretrained(net))
    elif (folder / CONTROL).is_dir():  # beside what training with another method has left
        controlled = over(light, _prepared(load_trained(pipe, folder), f"--adapter {folder}"))
        controlled.add_control("control", read_encoder(folder / CONTROL))
    else:
        controlled = over(light, pipe)
        controlled.load_ether_weights(options.adapter)
        if not controlled.controls:
            raise InputError(f"--adapter {folder}: holds no control encoder, so images would ignore their maps")
    controlled.set_progress_bar_config(disable=True)
    return controlled, "control_image" if net is None else nets.argument


def _side(pipe: DiffusionPipeline, base: str) -> int:
    """Side in pixels of the images that are generated."""
    if denoiser_name(pipe) == "unet":
        return latent_side(pipe.unet, base) * pipe.vae_scale_factor
    return native_sides(pipe)[0]


def _guidance(pipe: DiffusionPipeline, options: ControlEvaluation) -> float:
    """Guidance by the caption: as asked for, else a UNet's usual one or the pipeline's own."""
    if options.guidance_scale is not None:
        return options.guidance_scale
    if denoiser_name(pipe) == "unet":
        return GUIDANCE_SCALE
    return inspect.signature(type(pipe).__call__).parameters[guidance_argument(pipe)].default


def _controlnet_class(folder: Path) -> str | None:
    """Name of the class of a ControlNet in a folder; None where there is none."""
    config = folder / "config.json"
    name = json.loads(config.read_text("utf-8")).get("_class_name") if config.is_file() else None
    return name if name in {kind.model_class.__name__ for _, kind in CONTROLNETS.values()} else None


def _generate(
    pipe: DiffusionPipeline, samples: Sequence[Sample], options: ControlEvaluation, argument: str | None = None
) -> list[Image.Image]:
    """One image for each sample. Sample k starts from the same noise in any batch, with control and without.

    argument: the pipeline's for control images; None for a pipeline without control.
    """
    images: list[Image.Image] = []
    title = "without control" if argument is None else "with control"
    how: dict[str, Any] = {}
    if denoiser_name(pipe) == "transformer":
        how[guidance_argument(pipe)] = options.guidance_scale
        if "use_resolution_binning" in inspect.signature(stock_class(pipe).__call__).parameters:
            how["use_resolution_binning"] = False  # the size is that of the control images
    else:
        how["guidance_scale"] = options.guidance_scale
    for start in tqdm(range(0, len(samples), options.batch_size), desc=title, mininterval=5):
        part = samples[start : start + options.batch_size]
        control: dict[str, Any] = {}
        if argument is not None:
            control[argument] = [sample.control for sample in part]
            control["controlnet_conditioning_scale"] = options.controlnet_conditioning_scale
        draws = [generator(options.seed, "evaluation", start + k) for k in range(len(part))]
        control |= start_noise(pipe, len(part), part[0].control.size[::-1], draws)
        images += pipe(
            [sample.text for sample in part],
            num_inference_steps=options.num_inference_steps,
            **how,
            generator=draws,
            **control,
        ).images
    return images


# Evaluators -------------------------------------------------------------------------------------------------------


class SegmentationEvaluator:
    """Scores by segmentation: mean IoU and pixel accuracy against labels, or against what is seen in real images."""

    def __init__(self, segmenter: metrics.Segmenter, record: dict[str, Any], batch_size: int):
        self.segmenter, self.record, self.batch_size = segmenter, record, batch_size

    def truth(self, samples: Sequence[Sample]) -> list[Tensor]:
        known = samples[0].labels is not None
        self.record["truth"] = "labels" if known else "the evaluator on the real images"
        if known:
            return [sample.labels for sample in samples]
        return list(self._segment([sample.real for sample in samples]))

    def scores(self, images: Sequence[Image.Image], truth: Sequence[Tensor]) -> dict[str, float | None]:
        counts = metrics.confusion(self._segment(images), torch.stack(list(truth)), self.segmenter.classes, IGNORED)
        return {"mean_iou": metrics.mean_iou(counts), "pixel_accuracy": metrics.pixel_accuracy(counts)}

    def _segment(self, images: Sequence[Image.Image]) -> Tensor:
        parts = (images[k : k + self.batch_size] for k in range(0, len(images), self.batch_size))
        return torch.cat([self.segmenter(part) for part in parts])


class EdgeEvaluator:
    """Scores by edges: the mean F1 between an image's edges and its control image's."""

    def __init__(self) -> None:
        self.record = {"name": "edges", "threshold": metrics.EDGE_THRESHOLD, "truth": "control images"}

    def truth(self, samples: Sequence[Sample]) -> list[Image.Image]:
        return [sample.control for sample in samples]

    def scores(self, images: Sequence[Image.Image], truth: Sequence[Image.Image]) -> dict[str, float | None]:
        each = [metrics.edge_consistency(image, wanted) for image, wanted in zip(images, truth, strict=True)]
        return {"edge_f1": sum(each) / len(each)}


def make_evaluator(options: ControlEvaluation, device: torch.device) -> SegmentationEvaluator | EdgeEvaluator:
    """The evaluator that the options name; the miniature's is trained first where its folder holds none."""
    name = options.evaluator or (UPERNET if options.miniature is None else MINIATURE)
    if name == "edges":
        return EdgeEvaluator()
    if name == MINIATURE:
        segmenter = MiniatureSegmenter.load_or_train(options.evaluator_dir or options.output_dir / "evaluator")
        return SegmentationEvaluator(segmenter, {"name": name} | segmenter.record, batch_size=64)
    return SegmentationEvaluator(metrics.UperNetSegmenter(name, device), {"name": name}, options.batch_size)
