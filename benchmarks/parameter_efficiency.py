"""What does a parameter buy? Quality against the number of parameters, each method at its own best learning rate.

    python benchmarks/parameter_efficiency.py --output_dir out/studies --processes 2
    python benchmarks/parameter_efficiency.py --output_dir out/quick --quick

ETHER and ETHER+ with 1, 4 and 16 blocks, ETHER+ on one side, LoRA, HRA and VeRA of several ranks, OFT of several
block sizes. The search climbs in half decades to the highest similarity to the subject (CLIP-I) among the rates that
keep the similarity of other images to their prompts (CLIP-T) at 90 % of the base model's, over the same pairs of a
subject and a seed as benchmarks/lr_robustness.py, whose trials in the same --output_dir are not run again. It starts
from the best rate among the variant's trials there, or from that of the method's first variant, or, for this, from
the method's default. Rates are chosen on the trials that are reported. Prints a table; differences to LoRA r=4 are
paired, with their standard error. What is not a flag here goes to the training script. Writes JSON row by row: the
same command goes on where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from lr_robustness import ENOUGH, RATES, best_rate, means
from measuring import make_parser
from trials import Trial, Trials, Variant, add_settings, pairs, read_settings

from ether_diffusion.training.options import LEARNING_RATES

REFERENCE = "LoRA r=4"
QUICK = {"variants": 2, "pairs": 1, "max_train_steps": 2, "num_inference_steps": 2, "rates": (1e-3,)}


def variants() -> dict[str, list[Variant]]:
    """The variants of each method, those of the script's defaults first."""
    # Without target_modules: the layers are those of the base's family, as for the other variants.
    one_side = {"peft_type": "ETHER", "method": "ether_plus", "sides": "input"}
    oft = {"peft_type": "OFT", "r": 0}
    return {
        "ether_plus": [
            Variant.of("ether_plus"),
            *(Variant(f"ETHER+ n={n}", {"method": "ether_plus", "num_blocks": n}) for n in (4, 16)),
            Variant("ETHER+ one side", config=one_side),
        ],
        "lora": [
            Variant.of("lora"),
            *(Variant(f"LoRA r={rank}", {"method": "lora", "rank": rank}) for rank in (1, 2, 8, 16)),
        ],
        "ether": [
            Variant.of("ether"),
            *(Variant(f"ETHER n={n}", {"method": "ether", "num_blocks": n}) for n in (4, 16)),
        ],
        "oft": [
            Variant.of("oft"),
            *(Variant(f"OFT, blocks of {size}", config={**oft, "oft_block_size": size}) for size in (2, 4, 8)),
        ],
        "hra": [Variant.of("hra"), *(Variant(f"HRA r={rank}", {"method": "hra", "rank": rank}) for rank in (4, 8))],
        "vera": [Variant.of("vera"), Variant("VeRA r=64", {"method": "vera", "rank": 64})],
    }


def score(rows: Sequence[Mapping[str, Any]], base_clip_t: float) -> float:
    """What a learning rate is chosen by: CLIP-I if CLIP-T is at least 90 % of the base model's.

    Otherwise CLIP-T less 2: below any that is faithful, and the way to one is upwards.
    """
    clip_i, clip_t = means(rows)
    return clip_i if clip_t >= ENOUGH * base_clip_t else clip_t - 2


def climb(rates: Sequence[float], start: float, score: Callable[[float], float]) -> float:
    """The best rate that steps to a better neighbour lead to, from the one next to the start."""
    k = min(range(len(rates)), key=lambda k: abs(math.log(rates[k] / start)))
    known = {k: score(rates[k])}
    while True:
        neighbours = [j for j in (k + 1, k - 1) if 0 <= j < len(rates)]
        known |= {j: score(rates[j]) for j in neighbours if j not in known}
        best = max([k, *neighbours], key=known.__getitem__)
        if best == k:
            return rates[k]
        k = best


def difference(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Mean of the paired differences in CLIP-I, and its standard error; None of a single pair."""
    gaps = [a["clip_i"] - b["clip_i"] for a, b in zip(rows, others, strict=True)]
    return mean(gaps), stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None


def line(variant: Variant, parameters: int, rows: Sequence[Mapping[str, Any]], reference: Sequence | None) -> str:
    figures = [mean(row[name] for row in rows) for name in ("clip_i", "clip_t", "held_out", "drift")]
    text = f"{variant.name:18}{parameters:>11,}{rows[0]['learning_rate']:>8.0e}"
    text += "".join(f"{figure:>8.3f}" if k != 2 else f"{figure:>10.4f}" for k, figure in enumerate(figures))
    if reference is None:
        return text
    gap, error = difference(rows, reference)
    return text + f"{gap:>+9.3f}" + (f" ± {error:.3f}" if error is not None else "")


def main() -> None:
    parser = make_parser(__doc__)
    add_settings(parser)
    parser.add_argument("--methods", nargs="+", choices=tuple(variants()), default=tuple(variants()))
    args, training_flags = parser.parse_known_args()
    args.rates, args.variants = RATES, None
    if args.quick:
        vars(args).update(QUICK)
    settings = read_settings(args, training_flags)
    chosen = pairs(args.pairs, args.data_dir, args.output_dir / "views")
    with Trials(settings, args.output_dir, processes=args.processes) as trials:
        _, base_clip_t = means(trials.base(chosen))
        reference, starts = None, dict(LEARNING_RATES)
        print(
            f"{'':18}{'parameters':>11}{'rate':>8}{'CLIP-I':>8}{'CLIP-T':>8}{'held out':>10}{'drift':>8}"
            f"   CLIP-I above {REFERENCE}",
            flush=True,
        )
        ordered = [(method, variant) for method in args.methods for variant in variants()[method]]
        # The reference comes first: what follows is said beside it.
        ordered.sort(key=lambda pair: pair[1].name != REFERENCE)
        for method, variant in ordered[: args.variants]:

            def planned(rate: float, variant: Variant = variant) -> list[Trial]:
                return [Trial(variant, rate, subject, seed, args.max_train_steps) for subject, seed in chosen]

            known = {rate: means(rows) for rate in args.rates if (rows := trials.measured(planned(rate)))}
            start = best_rate(known, base_clip_t) or starts[method]
            best = climb(args.rates, start, lambda rate: score(trials.run(planned(rate)), base_clip_t))
            rows = trials.run(planned(best))
            if variant == variants()[method][0]:
                starts[method] = best
            if variant.name == REFERENCE:
                reference = rows
            print(line(variant, variant.parameters(settings.model), rows, reference), flush=True)


if __name__ == "__main__":
    main()
