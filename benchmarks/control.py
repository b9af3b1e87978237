"""Light control on the miniature: what each method adds to the encoder alone.

    python benchmarks/control.py --output_dir out/control

Every method is trained by `ether_diffusion.training.control` on the same pairs, at a learning rate that suits it, and
measured by `ether-diffusion evaluate-control` on the same held-out maps: a segmentation network of the miniature's
world names each pixel of what was generated. Rows that are in the JSON already are not repeated. Prints a table.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from measuring import machine, make_parser
from result_file import ResultFile

from ether_diffusion.base_models import MINIATURE, MINIATURES
from ether_diffusion.commands.evaluate_control import evaluate_and_show
from ether_diffusion.commands.quickstart import CONTROL_FLAGS, train_control
from ether_diffusion.evaluation.control import ControlEvaluation
from ether_diffusion.miniature.control_data import HELD_OUT, KINDS, TRAINING_SEED, write_control_data

# Of the method; the encoder has --control_lr. "none" is the paper's encoder-only baseline.
LEARNING_RATES = {"none": None, "ether": 2e-3, "ether_plus": 2e-3, "lora": 1e-3, "oft": 5e-4}


def evaluate(adapter: Path, output_dir: Path, held_out: int, evaluator_dir: Path, kind: str, base: str) -> dict:
    """The report of `evaluate-control`."""
    measured_on = {"base": base, "miniature": held_out}
    if kind != "scenes":
        data = output_dir.parent / "held_out"
        if not data.exists():
            write_control_data(data, held_out, HELD_OUT, kind)
        measured_on = {"base": base, "data_dir": data, "evaluator": "edges", "fid_features": "none"}
    folders = {"adapter": str(adapter), "output_dir": output_dir, "evaluator_dir": evaluator_dir}
    evaluate_and_show(ControlEvaluation(**folders, **measured_on, num_inference_steps=10, batch_size=16))
    return json.loads((output_dir / "report.json").read_text())


def trained_parameters(adapter: Path) -> int:
    """The number that the model card states."""
    (count,) = re.findall(
        r"^\| trained parameters[^|]*\| *([\d,]+)", (adapter / "README.md").read_text(), re.MULTILINE
    )
    return int(count.replace(",", ""))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(LEARNING_RATES), default=list(LEARNING_RATES))
    parser.add_argument("--base", choices=list(MINIATURES), default=MINIATURE)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="semantic maps, or edges of filled circles")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--max_train_steps", type=int, default=800)
    parser.add_argument("--evaluator_dir", "--judge_dir", type=Path, help="default: in --output_dir")
    parser.add_argument("--quick", action="store_true", help="a few steps of two methods, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.methods, args.pairs, args.held_out, args.max_train_steps = ["none", "ether_plus"], 16, 4, 3
        args.kind = "circles"  # evaluated by their edges, without a network to train

    data = args.output_dir / "data"
    if not (data / "metadata.jsonl").exists():
        write_control_data(data, args.pairs, TRAINING_SEED, args.kind)
    settings = {name: getattr(args, name) for name in ("kind", "pairs", "held_out", "max_train_steps")}
    if args.base != MINIATURE:
        settings["base"] = args.base
    k = CONTROL_FLAGS.index("--max_train_steps")
    settings["flags"] = CONTROL_FLAGS[:k] + CONTROL_FLAGS[k + 2 :]  # the steps are a setting of their own
    results = ResultFile(args.output_dir / "control.json", settings, machine=machine())
    for method in args.methods:
        if results.find(method=method):
            continue
        folder = args.output_dir / method
        shutil.rmtree(folder, ignore_errors=True)
        rate = LEARNING_RATES[method]
        flags = ["--method", method, *(["--learning_rate", str(rate)] if rate else [])]
        train_control(data, folder / "adapter", args.base, [*flags, "--max_train_steps", str(args.max_train_steps)])
        evaluator_dir = args.evaluator_dir or args.output_dir / "evaluator"
        report = evaluate(
            folder / "adapter", folder / "evaluation", args.held_out, evaluator_dir, args.kind, args.base
        )
        count = trained_parameters(folder / "adapter")
        results.add({"method": method, "learning_rate": rate, "parameters": count, "scores": report["scores"]})

    names = list(results.rows[0]["scores"]["real"])
    print(f"{'':12}{'parameters':>12}" + "".join(f"{name:>16}" for name in names))
    for row in results.rows:
        print(f"{row['method']:12}{row['parameters']:>12,}" + cells(row["scores"]["with_control"], names))
    for reference in (name for name in results.rows[0]["scores"] if name != "with_control"):
        print(f"{reference:24}" + cells(results.rows[0]["scores"][reference], names))


def cells(scores: dict, names: list[str]) -> str:
    return "".join(f"{'–' if scores[name] is None else format(scores[name], '.4f'):>16}" for name in names)


if __name__ == "__main__":
    main()
