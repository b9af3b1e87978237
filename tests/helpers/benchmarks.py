"""What tests do with the benchmarks: call them as users do."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def start(script: str, *flags: object) -> subprocess.Popen:
    command = [sys.executable, str(FOLDER / script), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What it printed, or with another exit code its errors."""
    stdout, stderr = process.communicate()
    assert process.returncode == code, stderr
    return stderr if code else stdout


def call(script: str, *flags: object, code: int = 0) -> str:
    return finish(start(script, *flags), code)
