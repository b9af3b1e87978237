"""Where a step of train_dreambooth_ether.py goes besides the model: data, latents, optimiser, logging.

    python benchmarks/step_profile.py --output_dir out/benchmarks

Trains the miniature, or any base, on one of the drawn world's subjects, in this process, and times the parts of every
step. "model" is the denoiser's forward pass and the backward pass; reported is the median share of each part over the
steps after the first ones, in which images and prompts are encoded. On a GPU the parts are those of the host: it waits
for the device where the loss is read. Prints a table and writes JSON, by commit.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from measuring import machine, make_parser
from result_file import commit, write_json

from ether_diffusion.miniature.world import subjects
from ether_diffusion.training import dreambooth
from ether_diffusion.training.distributed import Replicated
from ether_diffusion.training.families.unet import UNetFamily
from ether_diffusion.training.loop import Trainer
from ether_diffusion.training.objectives import DenoisingObjective, ImageSet

MODEL = ("forward", "backward")
PARTS: dict[str, tuple[type, str]] = {
    "forward": (UNetFamily, "predict"),
    "backward": (Accelerator, "backward"),
    "files": (Trainer, "_load"),
    "samples": (ImageSet, "draw"),
    "prompts": (DenoisingObjective, "_condition"),
    "loss": (Trainer, "_agree"),
    "optimiser": (Replicated, "step"),
    "logging": (Trainer, "_log"),
}
"""The parts of a step, each one method; none is called by another."""
WARM = 5


class Stopwatch:
    """Seconds of every part since the last step ended."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        self.begun: float | None = None

    def timed(self, part: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                ended = time.perf_counter()
                self.now[part] = self.now.get(part, 0.0) + ended - started
                if part == "logging":  # the last part of a step
                    self._end(ended)

        return call

    def _end(self, ended: float) -> None:
        if self.begun is not None:
            total = ended - self.begun
            self.steps.append({**self.now, "rest": total - sum(self.now.values()), "total": total})
        self.now, self.begun = {}, ended


def profile(flags: list[str]) -> list[dict[str, float]]:
    """Seconds of every part, step by step, of one run of the script."""
    stopwatch = Stopwatch()
    stock = {part: vars(owner)[name] for part, (owner, name) in PARTS.items()}
    try:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, stopwatch.timed(part, stock[part]))
        dreambooth.main(flags)
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, stock[part])
    return stopwatch.steps[WARM:]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of the script, without their dashes")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        for number in range(4):
            subjects()[0].view(number).render().image.save(photos / f"{number}.png")
        given = {
            "instance_data_dir": photos, "instance_prompt": "a photo of sks thing", "output_dir": Path(folder, "out"),
            "max_train_steps": args.steps + WARM + 1, "num_validation_images": 0,
        }  # fmt: skip
        flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        steps = profile([*flags, *(f"--{word}" if k % 2 == 0 else word for k, word in enumerate(args.flags))])
    parts = (*PARTS, "rest")
    shares = {part: statistics.median(step.get(part, 0.0) / step["total"] for step in steps) for part in parts}
    outside = statistics.median(1 - sum(step[part] for part in MODEL) / step["total"] for step in steps)
    seconds = statistics.median(step["total"] for step in steps)
    print(f"\n{seconds * 1e3:.1f} ms a step, {outside:.2%} of it outside of the model")
    for part, share in shares.items():
        print(f"{part:14}{share:>8.2%}")
    path = args.output_dir / "step_profile.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    runs[str(commit())] = {"seconds": seconds, "outside": outside, "shares": shares}
    write_json(path, {"machine": machine(), "runs": runs})


if __name__ == "__main__":
    main()
