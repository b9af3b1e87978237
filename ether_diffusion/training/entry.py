"""How a training script starts and ends: options read, errors told in one line, exit codes."""

import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ether_diffusion.errors import InputError, RunError, printable
from ether_diffusion.import_messages import without_import_messages
from ether_diffusion.training.memory import is_out_of_memory
from ether_diffusion.training.options import parse_options
from ether_diffusion.training.stop_signals import Interrupted

logger = logging.getLogger(__name__)

Options = TypeVar("Options")
Result = TypeVar("Result")

WRONG_INPUT, FAILED = 2, 1
"""Exit codes; a signal ends a run with 128 + its number."""
GOING_ON = "to go on, repeat the command with --resume_from_checkpoint latest"
LESS_MEMORY = "lower --train_batch_size or --resolution, or give --gradient_checkpointing or --mixed_precision bf16"


def launch_command(script: str, arguments: Sequence[str]) -> str:
    """The command as it was typed, but for the place of the script.

    script: the file, for a run that `python -m` has not started.
    """
    started = getattr(sys.modules["__main__"], "__spec__", None)  # a module's; a script has none
    if started is not None and started.name.startswith(__package__):
        return shlex.join(["accelerate", "launch", "-m", started.name, *arguments])
    return shlex.join(["accelerate", "launch", Path(script).name, *arguments])


def run_script(
    run: Callable[[Options, str], Result],
    options: type[Options],
    *,
    script: str,
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> Result:
    """Read the command line and run; an error that needs no traceback becomes one line on stderr.

    This is the one door by which all errors leave that a user can cause. What has a traceback is a fault of the code.

    Args:
        run: called with the options and the command as it was typed.
        script: as for `launch_command`.
        options, description, arguments: as for `parse_options`.

    Raises:
        SystemExit: with `WRONG_INPUT`, `FAILED`, or 128 + the number of the signal that stopped the run.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ether_diffusion.training").setLevel(logging.INFO)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with without_import_messages():
            return run(parse_options(options, arguments, description), launch_command(script, arguments))
    except Interrupted as stop:
        _tell(str(stop))
        raise SystemExit(stop.exit_code) from stop
    except KeyboardInterrupt as stop:  # outside of the loop, which ends with a checkpoint
        _tell(" ".join(["stopped by SIGINT;", *map(str, stop.args), GOING_ON]))
        raise SystemExit(128 + signal.SIGINT) from stop
    except InputError as error:
        _tell(f"error: {error}")
        raise SystemExit(WRONG_INPUT) from error
    except (FloatingPointError, OSError, RunError) as error:
        _tell(f"error: {error}")
        raise SystemExit(FAILED) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _tell(f"error: the memory is not enough ({error}); {LESS_MEMORY}")
        raise SystemExit(FAILED) from error


def _tell(message: str) -> None:
    """Say it once, however many processes there are, in one line that is safe on a terminal."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(re.sub(r"\s*[\r\n]\s*", " ", message.strip())), file=sys.stderr, flush=True)


def narrate(message: str, *values: Any) -> None:
    """Log progress, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        logger.info(message, *values)
