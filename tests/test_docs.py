"""The documentation: its table is that of the code, the scripts take its commands, its links lead somewhere."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import flag_table
import pytest
from helpers.scripts import CONTROLNET, DREAMBOOTH, ROOT

from ether_diffusion.training import control, dreambooth
from ether_diffusion.training.methods.configs import read_method
from ether_diffusion.training.options import AdapterOptions, OptimizationOptions, option, parse_options

SCRIPTS = [DREAMBOOTH, *ROOT.glob("train_controlnet_ether.py")]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = ("accelerate", "torchrun", "python")
SHELL = re.compile(r"[|&;]|&&|\|\||\d?>{1,2}(&\d)?")


def blocks(page: Path, *languages: str) -> list[str]:
    """The text of a page's blocks of code in any of the languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The calls of training scripts in a page's blocks of code: name of the script, words after it."""
    found = []
    for block in blocks(page, "", "bash", "sh", "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            if not re.search(r"train_\w+_ether\.py", line):
                continue
            words = shlex.split(line, comments=True)
            places = [k for k, word in enumerate(words) if re.fullmatch(r"(\S*/)?train_\w+_ether\.py", word)]
            # A module that takes scripts as its arguments is no call of them.
            if places and any(word in LAUNCHERS for word in words[: places[0]]) and "-m ether" not in line:
                after = words[places[0] + 1 :]
                end = next((k for k, word in enumerate(after) if SHELL.fullmatch(word)), len(after))
                found.append((Path(words[places[0]]).name, after[:end]))
    return found


COMMANDS = [(page.name, *command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(
    ("script", "words"),
    [command[1:] for command in COMMANDS],
    ids=[f"{name}-{number}" for number, (name, *_) in enumerate(COMMANDS)],
)
def test_commands_in_the_documentation_can_be_given(script, words):
    options = {DREAMBOOTH.name: dreambooth, CONTROLNET.name: control}[script].Options
    assert isinstance(parse_options(options, words), options)


def test_the_guide_has_commands_to_test():
    assert {"README.md", "training.md", "control.md"} <= {name for name, *_ in COMMANDS}


def test_commands_are_found_whole(tmp_path):
    page = tmp_path / "page.md"
    lines = [
        "Text with `accelerate launch train_x_ether.py --no`.",
        "```json\naccelerate train_x_ether.py\n```",
        "```bash\nA=1 accelerate launch --mixed_precision fp16 \\",
        '  train_x_ether.py --a "b c" \\\n  --d > log 2>&1  # a remark',
        "torchrun some/train_y_ether.py &",
        "ls train_x_ether.py",
        "```",
    ]
    page.write_text("\n".join(lines))
    assert commands(page) == [("train_x_ether.py", ["--a", "b c", "--d"]), ("train_y_ether.py", [])]


def test_adapter_configs_in_the_guide_can_be_given(tmp_path):
    (config,) = blocks(ROOT / "docs" / "training.md", "json")
    (tmp_path / "config.json").write_text(config)
    assert read_method(AdapterOptions(adapter_config=str(tmp_path / "config.json"))).layout == "lora"


def test_the_config_file_in_the_guide_can_be_given(tmp_path):
    (config,) = blocks(ROOT / "docs" / "training.md", "yaml")
    (tmp_path / "dog.yaml").write_text(config)
    assert parse_options(dreambooth.Options, [str(tmp_path / "dog.yaml")]).run.output_dir == "out/dog"


def test_the_table_of_flags_is_that_of_the_code(capsys):
    assert set(SCRIPTS) == set(ROOT.glob("train_*_ether.py"))
    flag_table.main()
    page = (ROOT / "docs" / "training-flags.md").read_text("utf-8")
    assert capsys.readouterr().out == page, "docs/training-flags.md is out of date; make docs"


def test_the_table_of_flags_says_what_holds_without_a_flag_and_what_it_may_be():
    table = flag_table.render({"one.py": dreambooth.Options})
    rows = dict(re.findall(r"^\| `--(\w+)`[ °]* \| (.*) \|$", table, re.MULTILINE))
    assert rows["instance_prompt"].startswith("needed | ")
    assert rows["seed"].startswith("`0` | ")
    assert rows["random_flip"].startswith("off | ")
    assert rows["resolution"].startswith("the model's native size | ")
    assert rows["mixed_precision"].endswith(" One of `no`, `fp16`, `bf16`.")
    assert rows["target_modules"].endswith(" One or more.")
    assert rows["hub_model_id"].endswith(" Only with `--push_to_hub`.")
    assert "`--output_dir` °" in table and "`--seed` |" in table


def test_what_two_scripts_share_is_in_the_table_once():
    @dataclass(frozen=True, kw_only=True)
    class Steps(OptimizationOptions):
        """optimisation"""

        lr_power: float = option("Another power.", 2.0)
        patience: int = option("Steps to wait.")

    @dataclass(frozen=True, kw_only=True)
    class Other(dreambooth.Options):
        optimization: Steps

    one, two = flag_table.render({"one.py": dreambooth.Options, "two.py": Other}).split("## two.py\n\n")
    assert "### run\n" in one and "`--max_train_steps`" in one
    assert two.startswith("As in one.py: base model, how images are cut, method, speed and memory, ")
    assert two.split("\n\n", 1)[1] == (
        "### optimisation\n\nAs in one.py, and:\n\n| flag | default | what it does |\n|---|---|---|\n"
        "| `--lr_power` | `2.0` | Another power. |\n| `--patience` | needed | Steps to wait. |\n"
    )


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings]
            assert heading in slugs, f"{page.name} links to {link}; the headings are {slugs}"


def test_files_named_in_the_guide_for_contributors_are_there():
    guide = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = set(re.findall(r"`(\w[\w/]*/(?:\w+\.(?:py|md))?)`", guide))
    assert len(named) > 30
    missing = [name for name in named if not ((ROOT / name).exists() or any((ROOT / "ether_diffusion").rglob(name)))]
    assert not missing, f"CONTRIBUTING.md names {sorted(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_lines_are_not_longer_than_119_columns(page):
    lines = page.read_text("utf-8").splitlines()
    assert [line for line in lines if len(line) > 119 and not line.startswith("|")] == []
