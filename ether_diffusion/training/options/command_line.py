"""The command line of a script, made from the dataclasses of its options.

transformers' `HfArgumentParser` makes a parser from dataclasses; here it learns our fields' metadata, and what a user
needs: errors in one line, switches without a value, no abbreviations, and flags in a YAML or JSON file.
"""

import argparse
import dataclasses
import difflib
import itertools
import json
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from ether_diffusion.errors import InputError, printable
from ether_diffusion.training.options.base import OptionGroup, groups_of

Options = TypeVar("Options")

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
WITHOUT_EFFECT: dict[str, type | None] = {"set_grads_to_none": None, "dataloader_num_workers": int, "local_rank": int}
"""Flags of other scripts that commands carry and on which nothing depends here, with the type of their value."""
OTHER_NAMES = {
    "lr": "learning_rate",
    "unet_lr": "learning_rate",
    "min_snr_gamma": "snr_gamma",
    "xformers": "enable_xformers_memory_efficient_attention",
    "batch_size": "train_batch_size",
    "steps": "max_train_steps",
    "epochs": "num_train_epochs",
    "max_train_epochs": "num_train_epochs",
    "network_dim": "rank",
    "lora_rank": "rank",
    "optimizer_type": "optimizer",
    "vae": "pretrained_vae_model_name_or_path",
    "model": "pretrained_model_name_or_path",
    "resume": "resume_from_checkpoint",
    "save_every_n_steps": "checkpointing_steps",
    "save_steps": "checkpointing_steps",
    "sample_prompts": "validation_prompt",
    "sample_every_n_steps": "validation_steps",
    "train_data_dir": "instance_data_dir",
    "instance_data_dir": "train_data_dir",
}
"""What flags are called in other scripts -> here."""

_FLAG = re.compile(r"--?([A-Za-z][\w-]*)(=.*)?", re.DOTALL)


class OptionParser(HfArgumentParser):
    """The command line of a dataclass of option groups.

    Args:
        options: a dataclass whose fields are annotated with subclasses of `OptionGroup`.
        description: what `--help` says first.
    """

    def __init__(self, options: type, description: str | None = None):
        super().__init__(
            groups_of(options).values(),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # an abbreviated flag would change its meaning when a flag is added
        )
        for name, kind in WITHOUT_EFFECT.items():
            arguments = {"action": "store_true"} if kind is None else {"type": kind}
            spelled = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])  # as torch's launcher writes it
            self.add_argument(*spelled, dest=name, help=argparse.SUPPRESS, **arguments)

    def parse_known_args(self, args=None, namespace=None):
        # Before argparse looks for flags that are missing: one of them may be the one that is misspelled.
        words = list(sys.argv[1:] if args is None else args)
        for number, word in enumerate(words):
            flag = _FLAG.fullmatch(word)
            if flag and word.partition("=")[0] not in self._option_string_actions:
                values = itertools.takewhile(lambda each: not each.startswith("-"), words[number + 1 :])
                self.error(f"unrecognized arguments: {' '.join([word, *values])}{self.suggest(flag[1], '--')}")
        return super().parse_known_args(args, namespace)

    def suggest(self, name: str, dashes: str = "") -> str:
        """The end of an error message about a flag of an unknown name: which one may be meant, if any."""
        known = [action.dest for action in self._actions if action.dest not in ("help", *WITHOUT_EFFECT)]
        plain = name.replace("-", "_").lower()
        likely = [each for each in (plain, OTHER_NAMES.get(plain)) if each in known]
        likely += [each for each in known if each.startswith(f"{plain}_")]
        likely += difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
        return f" (did you mean {dashes}{likely[0]}?)" if likely else ""

    def error(self, message: str) -> NoReturn:
        # One line: the usage of so many flags would hide it.
        self.exit(2, f"error: {printable(message)}; --help lists the flags\n")

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        """Add the flag of one field: a switch, a scalar, or several texts, the latter two perhaps None."""
        kind, arguments = field.type, {}
        if isinstance(kind, types.UnionType):
            (kind,) = (each for each in kind.__args__ if each is not type(None))
        if kind is bool:
            arguments["action"] = "store_true"
        else:
            several = typing.get_origin(kind) is tuple
            arguments |= {"nargs": "+", "type": typing.get_args(kind)[0]} if several else {"type": kind}
            arguments |= {"choices": field.metadata["choices"]}
            required = field.default is dataclasses.MISSING
            arguments |= {"required": True} if required else {"default": field.default}
        text = field.metadata["help"]
        if field.default not in (dataclasses.MISSING, None, False) and "Default" not in text:
            default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
            text += f" Default: {default}."
        parser.add_argument(f"--{field.name}", help=text.replace("%", "%%"), **arguments)

    def read_config(self, path: str) -> None:
        """Take the defaults of the flags from a YAML or JSON file, whose keys are named like them.

        Raises:
            InputError: a file that cannot be read, a key that is no flag, or a value of another kind.
        """
        try:
            text = Path(path).read_text("utf-8")
            given = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{path}: cannot be read as a config file ({' '.join(str(error).split())})") from error
        if not isinstance(given, dict):
            raise InputError(f"{path}: holds {type(given).__name__}, needs names of flags with their values")
        actions = {action.dest: action for action in self._actions if action.dest != "help"}
        for name, value in given.items():
            if name not in actions:
                raise InputError(
                    f"{path}: no flag is called {name!r}; --help lists the flags{self.suggest(str(name))}"
                )
            if value is not None:
                actions[name].default, actions[name].required = _default_of(actions[name], value, path), False


def _default_of(action: argparse.Action, value: Any, path: str) -> Any:
    """A value from a config file as argparse takes a flag's default: scalars as text, which it then converts."""
    kind, words = (str, int, float), "one number or text"
    if action.nargs == 0:
        kind, words = bool, "true or false"
    elif action.nargs == "+":
        kind, words = list, "a list of texts"
        value = [value] if value in (action.choices or ()) else value
    # In Python true and false are numbers, too.
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise InputError(f"{path}: {action.dest} is {value!r}, needs {words}")
    return tuple(map(str, value)) if kind is list else value if kind is bool else str(value)


def add_flags(parser: argparse.ArgumentParser, group: type[OptionGroup]) -> None:
    """Add the flags of one group to a parser of another kind, such as that of a subcommand."""
    for each in dataclasses.fields(group):
        OptionParser._parse_dataclass_field(parser, each)


def parse_options(
    options: type[Options], arguments: Sequence[str] | None = None, description: str | None = None
) -> Options:
    """Read a command line into a dataclass of option groups.

    Args:
        options: as for `OptionParser`.
        arguments: the words after the script's name; `sys.argv[1:]` if None. The first may be a YAML or JSON file
            with values of flags; flags after it go before them.
        description: what `--help` says first.

    Raises:
        SystemExit: an unknown flag, a missing one, a value of the wrong type or outside the choices.
        InputError: a value that does not fit, or a config file that cannot be used.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = OptionParser(options, description)
    if arguments and arguments[0].endswith(CONFIG_SUFFIXES):
        parser.read_config(os.path.expanduser(arguments.pop(0)))
    values = vars(parser.parse_args(arguments))
    values = {name: value for name, value in values.items() if name not in WITHOUT_EFFECT}
    if empty := next((name for name, value in values.items() if value == []), None):  # argparse drops a lone --
        parser.error(f"argument --{empty}: expected a value")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return options(**dict(zip(groups_of(options), parser.parse_dict(values), strict=True)))
