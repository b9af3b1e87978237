"""Every flag of the training scripts as Markdown, from the same dataclasses as their command lines.

python -m ether_diffusion.training.flag_table train_dreambooth_ether.py > docs/training-flags.md
"""

import argparse
import dataclasses
import importlib.util
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.training.command_line import InputError, OptionGroup

OPTIONS_NAME = "Options"
"""What a script calls the dataclass of its option groups."""

INTRODUCTION = """\
# Flags of the training scripts

Made by `make docs` from the dataclasses that the command lines are made from; `--help` says the same. "off" is a
switch: it takes no value. A run that goes on from a checkpoint has to repeat all flags but those with a °; what such a
flag names may lie elsewhere, but data and configs have to be the same
([stopping and going on](training.md#stopping-and-going-on))."""

HEAD = ("| flag | default | what it does |", "|---|---|---|")


def options_of(script: str | Path) -> type:
    """The dataclass of option groups of a script, which is run as a module, not as a program.

    Raises:
        InputError: there is no such script, or it has no dataclass `Options`.
    """
    script = Path(script)
    if not script.is_file():
        raise InputError(f"{script}: there is no such file, needs a training script")
    module = sys.modules.get(script.stem)
    if module is None or Path(str(module.__file__)).resolve() != script.resolve():
        spec = importlib.util.spec_from_file_location(script.stem, script)
        if spec is None or spec.loader is None:
            raise InputError(f"{script}: is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[script.stem] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    options = getattr(module, OPTIONS_NAME, None)
    if not dataclasses.is_dataclass(options):
        raise InputError(f"{script}: has no dataclass {OPTIONS_NAME}, needs one of option groups")
    return typing.cast(type, options)


def render(scripts: Mapping[str, type]) -> str:
    """The page: a section for each script, in it a table for each group, in the order of `--help`.

    What a script has in common with one before it is named there, not repeated.

    Args:
        scripts: name of the script -> dataclass of its option groups.
    """
    parts = [INTRODUCTION]
    known: dict[tuple[str, str], str] = {}  # (title, row) -> the script that has it first
    for script, options in scripts.items():
        parts.append(f"## {script}")
        hints = typing.get_type_hints(options)
        tables = {_title(group): _rows(group) for group in (hints[each.name] for each in dataclasses.fields(options))}
        shared: dict[str, list[str]] = {}
        for title, rows in tables.items():
            if all((title, row) in known for row in rows):
                shared.setdefault(known[title, rows[0]], []).append(title)
        parts += [f"As in {before}: {', '.join(titles)}." for before, titles in shared.items()]
        for title, rows in tables.items():
            before = {known[title, row]: None for row in rows if (title, row) in known}
            if new := [row for row in rows if (title, row) not in known]:
                note = f"As in {', '.join(before)}, and:\n\n" if before else ""
                parts.append(f"### {title}\n\n{note}" + "\n".join([*HEAD, *new]))
                known |= {(title, row): script for row in new}
    return "\n\n".join(parts) + "\n"


def _title(group: type) -> str:
    return (group.__doc__ or group.__name__).strip()


def _rows(group: type[OptionGroup]) -> list[str]:
    rows = []
    annotations = typing.get_type_hints(group)
    for each in dataclasses.fields(group):
        text, default = _split_default(each)
        if each.metadata["choices"] and not all(choice in text for choice in each.metadata["choices"]):
            text += f" One of {', '.join(f'`{choice}`' for choice in each.metadata['choices'])}."
        if _takes_several(annotations[each.name]):
            text += " One or more."
        if each.metadata["needs"]:
            text += f" Only with --{each.metadata['needs']}."
        flag = f"`--{each.name}`" + (" °" if each.metadata["free"] else "")
        rows.append(f"| {flag} | {_cell(default)} | {_cell(text)} |")
    return rows


def _split_default(each: dataclasses.Field) -> tuple[str, str]:
    """What a flag does, and what holds without it: the field's default, or where that is none, what its help says."""
    text = each.metadata["help"]
    if each.default is dataclasses.MISSING:
        return text, "needed"
    if each.default is None or each.default is False:
        # Where it says more than a value, the help tells the default at its end.
        text, _, words = text.partition("Default")
        if words:
            return text.strip(), words.strip(": ").removesuffix(".")
        return text, "off" if each.default is False else "–"
    return text, f"`{each.default}`"


def _takes_several(annotation: Any) -> bool:
    return any(typing.get_origin(each) is tuple for each in (annotation, *typing.get_args(annotation)))


def _cell(text: str) -> str:
    """Text in one cell of a table, its flags as code."""
    flags = re.sub(r"(?<![`\w-])--[a-z][a-z0-9_]*", r"`\g<0>`", text)
    return " ".join(flags.split()).replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="+", help="Training scripts; what they share is in the section of the first.")
    scripts = parser.parse_args(arguments).scripts
    try:
        page = render({Path(script).name: options_of(script) for script in scripts})
    except InputError as error:
        parser.error(str(error))
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
