"""Every flag of the training scripts as Markdown, from the same dataclasses as their command lines.

python tools/flag_table.py > docs/training-flags.md
"""

import dataclasses
import re
import sys
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from ether_diffusion.training import control, dreambooth
from ether_diffusion.training.options import OptionGroup

INTRODUCTION = """\
# Flags of the training scripts

Made by `make docs` from the dataclasses that the command lines are made from; `--help` says the same. "off" is a
switch: it takes no value. A run that goes on from a checkpoint has to repeat all flags but those with a °; what such a
flag names may lie elsewhere, but data and configs have to be the same
([stopping and going on](training.md#stopping-and-going-on))."""

HEAD = ("| flag | default | what it does |", "|---|---|---|")


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
        parts += [textwrap.fill(f"As in {before}: {', '.join(titles)}.", 119) for before, titles in shared.items()]
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
        needs = each.metadata["needs"]
        if needs and f"--{needs}" not in text:
            text += f" Only with --{needs}."
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
    return text, f"`{' '.join(each.default) if isinstance(each.default, tuple) else each.default}`"


def _takes_several(annotation: Any) -> bool:
    return any(typing.get_origin(each) is tuple for each in (annotation, *typing.get_args(annotation)))


def _cell(text: str) -> str:
    """Text in one cell of a table, its flags as code."""
    flags = re.sub(r"(?<![`\w-])--[a-z][a-z0-9_]*", r"`\g<0>`", text)
    return " ".join(flags.split()).replace("|", "\\|")


def main() -> None:
    sys.stdout.write(
        render({"train_dreambooth_ether.py": dreambooth.Options, "train_controlnet_ether.py": control.Options})
    )


if __name__ == "__main__":
    main()
