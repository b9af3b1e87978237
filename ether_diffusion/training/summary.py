"""What a run has found, told before anything takes long."""

from __future__ import annotations

from ether_diffusion.training.entry import narrate
from ether_diffusion.training.run import CheckedRun


def tell_start(checked: CheckedRun, images: str) -> None:
    """Log a small table of what the run trains on and how, once for all processes.

    images: what is trained on, in words.
    """
    rows = start_rows(checked, images)
    width = max(map(len, rows))
    for name, text in rows.items():
        narrate("  %s  %s", name.ljust(width), text)


def start_rows(checked: CheckedRun, images: str) -> dict[str, str]:
    """The rows of the table, name -> text."""
    run, options = checked.run, checked.options.optimization
    processes = run.accelerator.num_processes
    samples = options.samples_per_step(processes)
    batch = f"{samples} images"
    if samples != options.train_batch_size:
        passes = options.gradient_accumulation_steps
        batch += f" ({options.train_batch_size} in a pass, {passes} pass{'es' * (passes > 1)}, "
        batch += f"{processes} process{'es' * (processes > 1)})"
    epochs = options.steps * samples / checked.epoch_samples
    return {
        "base": f"{run.source.name} ({run.family_class.pipeline_class})",
        "method": f"{run.method.title}, {run.adaptation.parameter_count:,} parameters at {options.learning_rate:g}",
        "images": images,
        "resolution": ", ".join(f"{width}x{height}" for height, width in run.targets),
        "batch": batch,
        "steps": f"{options.steps:,}, each image {epochs:.3g} times",
        "device": f"{run.accelerator.device.type}, mixed precision {run.precision}",
        "output": str(run.output_dir),
    }
