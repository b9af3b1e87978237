"""Draw images and control images of the miniature's world, as a folder that control training reads.

python tools/draw_control_data.py --output_dir out/maps --count 2000
"""

import argparse
from pathlib import Path

from ether_diffusion.miniature.control_data import KINDS, TRAINING_SEED, write_control_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", default=TRAINING_SEED)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0])
    args = parser.parse_args()
    write_control_data(args.output_dir, args.count, args.seed, args.kind)


if __name__ == "__main__":
    main()
