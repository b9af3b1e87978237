"""A benchmark's JSON file that grows row by row, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from ether_diffusion.files import replace_file


def commit() -> str | None:
    """The commit of the checkout, with "-dirty" where files differ from it; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step: a run that is killed while it writes loses nothing."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


class ResultFile:
    """Rows in a JSON file, under what they have in common.

    Args:
        path: rows that lie there already are kept; its folder is made.
        settings: what the rows depend on and do not say themselves.
        described: more to write beside them, such as the machine; those of the last run are kept.

    Raises:
        SystemExit: the rows there are of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], **described: Any):
        self.path, self.rows = path, []
        settings = json.loads(json.dumps(settings))  # as they come back: lists for tuples
        if path.exists():
            held = json.loads(path.read_text())
            if other := [name for name, value in settings.items() if held.get(name) != value]:
                what = ", ".join(f"{name} {held.get(name)}, not {settings[name]}" for name in other)
                raise SystemExit(f"error: {path}: holds rows of {what}; take another --output_dir")
            self.rows = held["rows"]
        self._head = {**settings, **described}
        self._commit = commit()
        path.parent.mkdir(parents=True, exist_ok=True)

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row that has all of these values, or None."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append a row, with the commit that it was measured at, and write the file."""
        self.rows.append({**row, "commit": self._commit})
        write_json(self.path, {**self._head, "rows": self.rows})
        return self.rows[-1]
