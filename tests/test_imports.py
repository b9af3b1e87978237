"""What importing the package brings with it, and that nothing is missing for that."""

import importlib
import json
import subprocess
import sys

import pytest
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline

import ether_diffusion
from ether_diffusion.adapters import stacks
from ether_diffusion.adapters.plugin import NAMES
from ether_diffusion.commands.main import COMMANDS
from ether_diffusion.control.encoder import ENCODERS
from ether_diffusion.control.kinds import ENCODER_KINDS
from ether_diffusion.evaluation.options import FEATURE_WIDTHS, INCEPTION
from ether_diffusion.export.formats import FORMATS
from ether_diffusion.export.lora_files import WRITERS
from ether_diffusion.metrics import frechet

NEVER = {"gradio", "matplotlib", "datasets", "torchmetrics", "wandb", "ray", "fastapi", "uvicorn"}
"""Heavy packages of extras."""
NOT_OURS = {"pandas", "scipy", "sklearn", "torchvision"}
"""Heavy packages that diffusers, transformers and PEFT may bring, where they are installed."""
LATER = {"diffusers.pipelines.pipeline_utils", "diffusers.models.unets", "diffusers.models.transformers"}
"""With these come all models and pipelines of diffusers."""

IMPORT_AND_ASK_FOR_HELP = """
import contextlib, io, json, logging, sys
import diffusers, transformers, peft
base = set(sys.modules)
with contextlib.redirect_stderr(io.StringIO()) as said:
    import ether_diffusion
from ether_diffusion.import_messages import BEGINNINGS, _is_wanted
assert not any(_is_wanted in logging.getLogger(name).filters for name in BEGINNINGS)
brought = {"import": sorted(set(sys.modules) - base)}
from ether_diffusion.commands.main import COMMANDS, main
for words in ([], *([name] for name in COMMANDS)):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([*words, "--help"])
    brought[" ".join([*words, "--help"])] = sorted(set(sys.modules) - base)
print(json.dumps([brought, said.getvalue()]))
"""

IMPORT_AT_ONCE = """
import importlib, threading
import ether_diffusion
failed = []
def load(name):
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed.append(error)
names = "diffusers.pipelines.pipeline_utils", "ether_diffusion.adapters.stacks", "ether_diffusion.export.merge"
threads = [threading.Thread(target=load, args=(name,)) for name in names]
for each in threads:
    each.start()
for each in threads:
    each.join()
assert not failed, failed
from diffusers import DiffusionPipeline
assert DiffusionPipeline.load_ether_weights.__module__ == "ether_diffusion.adapters.pipeline"
"""


def fresh(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_neither_the_import_nor_any_help_brings_heavy_packages_or_the_pipelines():
    brought, said = json.loads(fresh(IMPORT_AND_ASK_FOR_HELP).splitlines()[-1])
    assert len(brought) == len(COMMANDS) + 2 and said == ""
    for by, modules in brought.items():
        assert not {name.partition(".")[0] for name in modules} & (NEVER | NOT_OURS), by
        assert not {*modules} & LATER, by


def test_pipelines_that_are_imported_after_the_package_have_its_methods_by_whichever_module_comes_first():
    fresh(
        "import ether_diffusion.adapters.stacks\nfrom diffusers import DiffusionPipeline\n"
        "assert DiffusionPipeline.load_ether_weights.__module__ == 'ether_diffusion.adapters.pipeline'"
    )


def test_threads_may_import_pipelines_and_the_package_at_once():
    fresh(IMPORT_AT_ONCE)


def test_what_is_put_on_pipelines_later_is_what_is_put_there():
    assert callable(DiffusionPipeline.load_ether_weights)  # the first look puts all in place
    own = {name for name, value in vars(DiffusionPipeline).items() if str(_module_of(value)).startswith("ether_")}
    assert own == {*NAMES}


def _module_of(value: object) -> str | None:
    function = getattr(value, "function", None) or getattr(value, "fget", None) or value
    return getattr(function, "__module__", None)


def test_stock_methods_are_those_of_diffusers_below_ours():
    assert stacks.stock_save_pretrained.__module__ == "diffusers.pipelines.pipeline_utils"
    assert StableDiffusionPipeline.save_pretrained is stacks.save_pretrained
    assert not hasattr(DiffusionPipeline, "load_lora_weights") and hasattr(FluxPipeline, "load_lora_weights")


@pytest.mark.parametrize("package", ["", ".export", ".miniature", ".serving"])
def test_every_public_name_of_a_package_is_there(package):
    module = importlib.import_module(f"ether_diffusion{package}")
    assert {*module.__all__} <= {*dir(module)}
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'ether_diffusion' has no attribute 'EtherControlPipe'"):
        ether_diffusion.EtherControlPipe  # noqa: B018


def test_names_that_flags_offer_are_those_of_what_carries_them_out():
    assert FORMATS == tuple(WRITERS) and ENCODER_KINDS == tuple(ENCODERS) and INCEPTION == frechet.INCEPTION
    assert FEATURE_WIDTHS[INCEPTION] == frechet.INCEPTION_WIDTH


def test_a_command_starts_without_a_word_from_the_libraries():
    code = "from ether_diffusion.commands.main import main; main(['inspect', 'nothing-here'])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (line,) = told.stderr.splitlines()
    assert line.startswith("ether-diffusion: error: nothing-here")
