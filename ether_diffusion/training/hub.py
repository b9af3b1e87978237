"""What a run leaves goes to the Hub: the repository is there before the training, the files follow after it."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP client that the Hub's library uses: no connection, no answer in time
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ether_diffusion.errors import InputError
from ether_diffusion.training.checkpoint_files import PREFIX
from ether_diffusion.training.options import RunOptions
from ether_diffusion.training.trackers import PROJECT

NOT_UPLOADED = (f"{PREFIX}*", ".*", "*/.*")
"""Checkpoints and hidden files."""


def check_hub(run: RunOptions) -> str | None:
    """Create the repository that `--push_to_hub` asks for, or find it, and return its id; None without that flag.

    For one process of the run. Nothing is uploaded yet.

    Raises:
        InputError: the id is none, nobody is logged in, the Hub is out of reach, or the token may not write there.
    """
    if not run.push_to_hub:
        return None
    given = run.hub_model_id
    where = f"--hub_model_id {given}" if given else f"--push_to_hub with --output_dir {run.output_dir}"
    name = given or Path(run.output_dir).resolve().name
    api = HfApi()
    try:
        repo_id = name if "/" in name else f"{api.whoami()['name']}/{name}"
        api.create_repo(repo_id, exist_ok=True)
        # An existing repository of somebody else passes for one's own until here.
        api.auth_check(repo_id, write=True)
    except HFValidationError as error:
        raise InputError(
            f"{where}: {name!r} is no repository id; --hub_model_id needs `name` or `namespace/name`, of letters, "
            "digits and single `-`, `_` and `.` in between, at most 96 characters"
        ) from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"{where}: there is no token for the Hub; `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise InputError(f"{where}: HF_HUB_OFFLINE is set; unset it, or drop --push_to_hub") from error
    except HfHubHTTPError as error:
        raise InputError(f"{where}: {_refusal(error, name)}") from error
    except (HTTPError, OSError) as error:
        raise InputError(f"{where}: {api.endpoint} is out of reach ({error})") from error
    return repo_id


def _refusal(error: HfHubHTTPError, name: str) -> str:
    status = error.response.status_code
    reason = error.server_message or error.response.reason_phrase
    if status == 401:
        return f"the Hub does not accept the token ({reason}); `hf auth login --force`, or set HF_TOKEN"
    if status in (403, 404):
        return (
            f"the token may not write to {name} ({reason}); `hf auth login --force` with a token with write access, "
            "or another --hub_model_id"
        )
    return f"the Hub answered {status} ({reason})"


def log_patterns(run: RunOptions) -> tuple[str, ...]:
    """The logs, as `upload` leaves them out; none where they lie outside the output folder."""
    output_dir = Path(run.output_dir).resolve()
    logs = (output_dir / run.logging_dir).resolve()
    if not logs.is_relative_to(output_dir):
        return ()
    folders = (logs / PROJECT, logs / "wandb") if logs == output_dir else (logs,)
    return tuple(f"{glob.escape(folder.relative_to(output_dir).as_posix())}/*" for folder in folders)


def upload(folder: Path, repo_id: str, *, ignore: Sequence[str] = ()) -> str:
    """Upload a run's folder, but for checkpoints and hidden files, and return the address of the repository.

    ignore: more to leave out, as patterns of paths inside the folder.

    Raises:
        OSError: the upload failed; says how to repeat it.
    """
    api, patterns = HfApi(), [*NOT_UPLOADED, *ignore]
    message = "Upload the result of the training"
    try:
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=list(patterns))
    except (HTTPError, OSError, ValueError) as error:
        excluded = [word for pattern in patterns for word in ("--exclude", pattern)]
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *excluded])
        raise OSError(
            f"{folder} is complete, but its upload to {repo_id} failed: {error}\nto repeat it: {command}"
        ) from error
    return f"{api.endpoint}/{repo_id}"
