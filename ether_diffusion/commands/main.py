"""`ether-diffusion <command>`: what can be done with adapter files outside of Python."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ether_diffusion.import_messages import without_import_messages

COMMANDS = {
    "quickstart": "teach the miniature a subject, or to follow maps, and see what it has learned",
    "recipe": "say how to train a model on a card of so much memory, and why",
    "inspect": "show what is in an adapter file, how far it has moved, and what it fits",
    "analyze": "measure what an adapter does to the weights of a base model",
    "export": "write adapters as a LoRA for PEFT, diffusers, or kohya's format (ComfyUI, A1111)",
    "merge": "write a whole pipeline with adapters merged into its weights",
    "generate": "generate images from prompts, each with adapters of its own, in mixed batches",
    "serve": "answer requests for images over HTTP, in OpenAI's form, each with adapters of its own",
    "evaluate-control": "measure how well images follow their control images",
    "demo": "open a web page to generate, train, inspect and export",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what the user got wrong is told in one sentence on stderr, and the exit code is 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="ether-diffusion", description=__doc__)
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == next(iter(arguments), None):  # only this command's module, and what that needs, is imported
            module = importlib.import_module(f"ether_diffusion.commands.{name.replace('-', '_')}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args, others = parser.parse_known_args(arguments)
    if hasattr(args, "other_flags"):  # the command passes them on
        args.other_flags = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        with without_import_messages():
            args.run(args)
    except (ValueError, OSError) as error:
        print(f"ether-diffusion: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
