"""Does a fine-tune on a subject's photographs help on one that it has not seen?

    python benchmarks/held_out_photograph.py --data_dir photos_by_subject --output_dir out/held_out

For every folder of photographs in --data_dir, trains on all but the last with `accelerate launch -m
ether_diffusion.training.dreambooth` (other flags go to it) and compares the denoising loss on the last one, over fixed
noises and timesteps, between the base model and the tuned one. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from denoising import denoising_loss
from measuring import machine, make_parser
from result_file import write_json
from subjects import Subject, add_base, photographed

from ether_diffusion.base_models import open_pipeline
from ether_diffusion.commands.quickstart import train
from ether_diffusion.images import read_image
from ether_diffusion.training.methods.saving import load_trained
from ether_diffusion.training.options import DEFAULT_METHOD, METHODS


def measure(subject: Subject, model: str, method: str, output_dir: Path, flags: list[str]) -> dict[str, float]:
    photographs, result = subject.copy_seen(output_dir / "photographs"), output_dir / "result"
    words = ["--method", method, "--instance_data_dir", photographs]
    words += ["--instance_prompt", subject.prompt, "--output_dir", result]
    train("dreambooth", model, [*flags, *words])

    losses = {}
    for name in ("base", "tuned"):
        pipe = open_pipeline(model) if name == "base" else load_trained(model, result)
        losses[f"{name}_held_out"] = denoising_loss(pipe, read_image(subject.held_out), subject.prompt)
        seen = [denoising_loss(pipe, read_image(path), subject.prompt) for path in subject.seen]
        losses[f"{name}_seen"] = sum(seen) / len(seen)
    return losses


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="one folder of photographs for each subject")
    add_base(parser)
    parser.add_argument("--method", choices=METHODS, default=DEFAULT_METHOD)
    args, flags = parser.parse_known_args()
    chosen = photographed(args.data_dir)
    shutil.rmtree(args.output_dir, ignore_errors=True)

    model = args.pretrained_model_name_or_path
    rows = {
        subject.name: measure(subject, model, args.method, args.output_dir / subject.name, flags) for subject in chosen
    }
    report = {"machine": machine(), "model": model, "method": args.method}
    report |= {"flags": flags, "denoising_loss": rows}
    write_json(args.output_dir / "held_out_photograph.json", report)
    print(f"\n{'subject':12}{'held out: base':>16}{'tuned':>8}{'ratio':>8}{'seen: base':>14}{'tuned':>8}")
    for name, row in rows.items():
        ratio = row["tuned_held_out"] / row["base_held_out"]
        print(
            f"{name:12}{row['base_held_out']:>16.4f}{row['tuned_held_out']:>8.4f}{ratio:>8.2f}"
            f"{row['base_seen']:>14.4f}{row['tuned_seen']:>8.4f}"
        )


if __name__ == "__main__":
    main()
