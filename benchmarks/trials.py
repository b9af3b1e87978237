"""One trial: a method learns a subject at a learning rate; then images are generated and measured.

What the studies of learning rates and parameters have in common. Trials are independent: `Trials` shares them out over
processes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from denoising import denoising_loss
from diffusers import DiffusionPipeline
from measuring import machine
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from PIL import Image
from result_file import ResultFile
from subjects import MINIATURE, PROMPTS_WITHOUT, Subject, add_base, base_settings, drawn, learn, photographed, squares
from torch import Tensor, nn

from ether_diffusion import EtherConfig
from ether_diffusion.analysis.weights import adapted_weights, energy_change
from ether_diffusion.base_models import base_path, miniature_name, open_pipeline
from ether_diffusion.commands.quickstart import OTHER_PROMPTS, SETTINGS
from ether_diffusion.evaluation.features import load_features
from ether_diffusion.images import read_image
from ether_diffusion.metrics import drift, image_similarity, text_similarity
from ether_diffusion.metrics.similarity import CLIP
from ether_diffusion.training.families import ModelSource, family_at, family_of
from ether_diffusion.training.methods.configs import KNOWN, configs_of, read_method
from ether_diffusion.training.methods.injection import dry_run
from ether_diffusion.training.methods.saving import load_trained
from ether_diffusion.training.options import DEFAULT_STEPS, RANKED_METHODS, AdapterOptions

BASE, IMAGES = "base", "pictures"
FIGURES = ("clip_i", "clip_t", "clip_t_subject", "drift", "held_out")
SEEDS = 2  # images of each prompt with the subject
GUIDANCE = 5.0
IMAGES_AT_ONCE = 8
OWN_FLAGS = (
    "--instance_data_dir", "--instance_prompt", "--learning_rate", "--method", "--adapter_config", "--rank",
    "--num_blocks", "--seed", "--num_validation_images", "--num_train_epochs",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    name: in rows and tables.
    options: flags of the training script and their values, such as {"method": "lora", "rank": 8}.
    config: a PEFT config in place of a method, as --adapter_config reads it.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, method: str) -> Variant:
        """A method as the training script has it by default."""
        rank = f" r={RANKED_METHODS[method]}" if method in RANKED_METHODS else ""
        return cls(f"{KNOWN[method][0]}{rank}", {"method": method})

    def given(self, folder: Path) -> dict[str, Any]:
        """The flags of the training script; a config is written into the folder."""
        if self.config is None:
            return dict(self.options)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(dict(self.config)))
        return {**self.options, "adapter_config": str(path)}

    def parameters(self, model: str = MINIATURE) -> int:
        """How many parameters are trained on a model."""
        source = ModelSource(base_path(model))
        family = family_at(source)
        with tempfile.TemporaryDirectory() as folder:
            options = AdapterOptions(**self.given(Path(folder)))
            configs = configs_of(read_method(options), family, options)
            return dry_run(family.read_blueprint(source).models, configs)


@dataclass(frozen=True)
class Settings:
    """What every trial of a study has in common.

    model: of the training and the generating, as `from_pretrained` takes it, or the name of a miniature.
    max_train_steps: of each training, unless a trial says otherwise.
    num_inference_steps: of every image.
    clip_model: what measures, as `load_features` takes it.
    flags: more words for the training script.
    """

    model: str = MINIATURE
    max_train_steps: int = DEFAULT_STEPS
    num_inference_steps: int = 15
    clip_model: str = MINIATURE
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    variant: Variant
    learning_rate: float
    subject: Subject
    seed: int
    steps: int

    @property
    def key(self) -> dict[str, Any]:
        """What a row of results is found by."""
        return {
            "variant": self.variant.name,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "subject": self.subject.name,
            "seed": self.seed,
        }


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags that every study has, beside --output_dir."""
    parser.add_argument("--pairs", type=int, default=4, help="of a subject and a seed")
    parser.add_argument("--data_dir", type=Path, help="folders of photographs; default: figures of the miniature")
    add_base(parser)
    parser.add_argument("--clip_model", help=f"default: {CLIP}, on the miniature its own")
    parser.add_argument("--max_train_steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--num_inference_steps", type=int, default=Settings.num_inference_steps)
    parser.add_argument("--processes", type=int, default=1, help="trials at the same time")
    parser.add_argument("--quick", action="store_true", help="a look at every part in less than a minute")


def read_settings(args: argparse.Namespace, training_flags: Sequence[str]) -> Settings:
    """The settings that the flags say.

    Raises:
        SystemExit: a flag for the training script that a study sets itself.
    """
    for word in training_flags:
        if word.startswith("--") and word.partition("=")[0] in OWN_FLAGS:
            raise SystemExit(f"error: {word}: every trial has its own; drop it")
    model = args.pretrained_model_name_or_path
    return Settings(
        model,
        args.max_train_steps,
        args.num_inference_steps,
        args.clip_model or (MINIATURE if miniature_name(model) else CLIP),
        tuple(training_flags),
    )


def pairs(count: int, data_dir: Path | None, views_dir: Path) -> list[tuple[Subject, int]]:
    """Pairs of a subject and a seed: pair k has seed k, and the subjects follow each other.

    count: of the pairs.
    data_dir: one folder of photographs for each subject; None: figures of the miniature's world.
    views_dir: where those are drawn.
    """
    subjects = list(drawn(min(count, 9), views_dir)) if data_dir is None else photographed(data_dir)
    return [(subjects[k % len(subjects)], k) for k in range(count)]


class Bench:
    """Runs trials in this process, one after the other.

    Args:
        settings: of the study.
        images_dir: the images of a trial's subject go into a folder there.
    """

    def __init__(self, settings: Settings, images_dir: Path):
        self.settings, self.images_dir = settings, images_dir
        self.model = base_path(settings.model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.features = load_features(settings.clip_model, device=self.device)
        if not hasattr(self.features, "embed_texts"):
            raise SystemExit(f"error: --clip_model {settings.clip_model}: has no text tower, needs a CLIP")
        self.others = OTHER_PROMPTS if miniature_name(settings.model) else PROMPTS_WITHOUT
        self._before: dict[str, tuple[dict[str, Any], list[Image.Image]]] = {}

    def base(self, subject: Subject, seed: int) -> dict[str, Any]:
        """The figures of the model as it is."""
        return self._base(subject, seed)[0]

    def _base(self, subject: Subject, seed: int) -> tuple[dict[str, Any], list[Image.Image]]:
        key = f"{subject.name}/{seed}"
        if key not in self._before:
            pipe = open_pipeline(self.model).to(self.device)
            figures, others = self._measure(pipe, subject, seed, self.images_dir / BASE / f"{subject.name}_{seed}")
            self._before[key] = {**figures, "drift": 0.0}, others
        return self._before[key]

    def run(self, trial: Trial) -> dict[str, Any]:
        """The figures after a training; where it failed, `failed` says how and the figures are None."""
        subject, seed = trial.subject, trial.seed
        _, before = self._base(subject, seed)
        with tempfile.TemporaryDirectory() as folder:
            seen, output_dir = subject.copy_seen(Path(folder, "seen")), Path(folder, "result")
            flags = {
                "pretrained_model_name_or_path": self.model,
                "learning_rate": trial.learning_rate,
                "max_train_steps": trial.steps,
                "seed": seed,
            }
            given = trial.variant.given(Path(folder))
            try:
                result = learn(seen, subject.prompt, output_dir, flags | given, self.settings.flags)
            except SystemExit as stop:
                if not isinstance(stop.__cause__, FloatingPointError):
                    raise
                return {**dict.fromkeys(FIGURES), "failed": "the loss is not finite"}
            except torch.linalg.LinAlgError:  # of methods that solve for an orthogonal matrix
                return {**dict.fromkeys(FIGURES), "failed": "a matrix is singular"}
            pipe = load_trained(self.model, output_dir).to(self.device)
            weights = changes(pipe, self.model)
            figures, others = self._measure(pipe, subject, seed, image_folder(self.images_dir, trial.key))
        return {**figures, "drift": drift(others, before, self.features), **weights, "seconds": result.seconds}

    def _measure(
        self, pipe: DiffusionPipeline, subject: Subject, seed: int, folder: Path
    ) -> tuple[dict[str, Any], list[Image.Image]]:
        """Figures of the images generated now, and those of prompts without the subject."""
        pipe.set_progress_bar_config(disable=True)
        prompts = [f"{subject.prompt} {setting}" for setting in SETTINGS for _ in range(SEEDS)]
        seeds = [1000 * seed + k for _ in SETTINGS for k in range(SEEDS)]
        own = self._generate(pipe, prompts, seeds)
        others = self._generate(pipe, self.others, [1000 * seed] * len(self.others))
        folder.mkdir(parents=True, exist_ok=True)
        for k, image in enumerate(own):
            image.save(folder / f"{k}.png")
        without = [prompt.replace("sks ", "") for prompt in prompts]  # the identifier means nothing to CLIP
        figures = {
            "clip_i": image_similarity(own, squares(subject, own[0].size), self.features),
            "clip_t": text_similarity(others, self.others, self.features),
            "clip_t_subject": text_similarity(own, without, self.features),
            "held_out": finite(denoising_loss(pipe, read_image(subject.held_out), subject.prompt, seed=seed)),
        }
        return figures, others

    def _generate(self, pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        images = []
        for k in range(0, len(prompts), IMAGES_AT_ONCE):
            part = slice(k, k + IMAGES_AT_ONCE)
            images += pipe(
                list(prompts[part]),
                num_inference_steps=self.settings.num_inference_steps,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            ).images
        return images


def image_folder(images_dir: Path, key: Mapping[str, Any]) -> Path:
    """Where the images of a trial's subject lie; `key` is the trial's, or its row."""
    rate = f"{key['learning_rate']:.0e}_{key['steps']}"
    return images_dir / key["variant"] / rate / f"{key['subject']}_{key['seed']}"


def finite(number: float) -> float | None:
    """JSON knows no infinity and no NaN."""
    return number if math.isfinite(number) else None


def changes(pipe: DiffusionPipeline, model: str) -> dict[str, float | None]:
    """What training did to the weights of the attention, as means over the layers.

    weight_distance: ‖W' − W‖_F; relative_distance: ‖W' − W‖_F / ‖W‖_F; energy_change: (E' − E)/E of the hyperspherical
    energy of the neurons; energy_moved: the mean of its absolute value. None where a weight is not finite.

    Args:
        pipe: with the adapters, or with weights that were all trained.
        model: what it was trained from.
    """
    rows = []
    for before, after in weight_pairs(denoiser(pipe), model):
        distance = (after.double() - before.double()).norm().item()
        if not math.isfinite(distance):
            rows.append((math.nan,) * 4)
            continue
        change = energy_change(before, after)
        rows.append((distance, distance / before.double().norm().item(), change, abs(change)))
    names = ("weight_distance", "relative_distance", "energy_change", "energy_moved")
    return {name: finite(sum(column) / len(rows)) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def denoiser(pipe: DiffusionPipeline) -> nn.Module:
    return getattr(pipe, family_of(pipe).denoiser)


def weight_pairs(tuned: nn.Module, model: str) -> Iterator[tuple[Tensor, Tensor]]:
    """W and W' of every layer with an adapter; without adapters, of the layers that would have had one."""
    if any(isinstance(layer, BaseTunerLayer) for layer in tuned.modules()):
        for _, before, after in adapted_weights(tuned):
            yield before, after
        return
    pipe = open_pipeline(model)
    base, targets = dict(denoiser(pipe).named_parameters()), family_of(pipe).targets
    for name, weight in tuned.named_parameters():
        if name.endswith(".weight") and is_target(targets, name.removesuffix(".weight")):
            yield base[name], weight.detach().to(base[name].device)


def is_target(targets: Sequence[str] | str, name: str) -> bool:
    """Whether a layer is one of these, as PEFT takes them: endings of names, or a pattern of whole names."""
    return bool(check_target_module_exists(EtherConfig(target_modules=targets), name))


_bench: Bench


def _prepare(settings: Settings, images_dir: Path, threads: int) -> None:
    global _bench
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _bench = Bench(settings, images_dir)


def _end_with_parent() -> None:
    """A study that is killed cannot tell its processes to stop: without it they would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(trial: Trial) -> dict[str, Any]:
    return _bench.run(trial)


def _measure_base(subject: Subject, seed: int) -> dict[str, Any]:
    return _bench.base(subject, seed)


class Trials:
    """Trials over several processes, for a `with` statement. One study at a time: each writes the whole file.

    Args:
        settings: of the study.
        output_dir: where rows and images go, and where rows of earlier trials are found.
        processes: how many trials run at the same time; the cores are shared out.
    """

    def __init__(self, settings: Settings, output_dir: Path, *, processes: int = 1):
        # The rows of all studies with these settings: what one has measured the others need not.
        shared = asdict(settings) | base_settings(settings.model)
        self.results = ResultFile(output_dir / "trials.json", shared, machine=machine())
        threads = max(1, (os.cpu_count() or 1) // processes)
        self._pool = ProcessPoolExecutor(
            processes,
            mp_context=multiprocessing.get_context("spawn"),  # torch's threads do not survive a fork
            initializer=_prepare,
            initargs=(settings, output_dir / IMAGES, threads),
        )

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def base(self, chosen: Sequence[tuple[Subject, int]]) -> list[dict[str, Any]]:
        """Rows of the base model for pairs of a subject and a seed."""
        keys = [{"variant": BASE, "subject": subject.name, "seed": seed} for subject, seed in chosen]
        if any(self.results.find(**key) is None for key in keys):
            measured = self._pool.map(_measure_base, *zip(*chosen, strict=True))
            for key, figures in zip(keys, measured, strict=True):
                self.results.add({**key, **figures})
        return [self.results.find(**key) for key in keys]

    def measured(self, trials: Sequence[Trial]) -> list[dict[str, Any]] | None:
        """The row of each trial, or None if any is not among the results yet."""
        rows = [self.results.find(**trial.key) for trial in trials]
        return None if None in rows else rows

    def run(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """The row of each trial; those that are not among the results yet are run."""
        missing = [trial for trial in trials if self.results.find(**trial.key) is None]
        for trial, figures in zip(missing, self._pool.map(_run, missing), strict=True):
            self.results.add({**trial.key, **figures})
        return [self.results.find(**trial.key) for trial in trials]
