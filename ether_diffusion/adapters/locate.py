"""Where an adapter is loaded from: a file, a folder, or a repository on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from ether_diffusion.adapters.schema import (
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    WEIGHTS_NAME,
    AdapterFile,
    is_pickle_by_name,
    read_adapter_file,
    read_peft_folder,
)
from ether_diffusion.errors import EtherFileError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_adapter_file(
    source: str | Path,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> AdapterFile:
    """Read the adapter at `source`: a file or folder on disk, else an id on the Hub.

    Raises:
        FileNotFoundError: nothing there; says what was looked for.
        EtherFileError: a file that cannot be loaded.
        ValueError: a `weight_name` or `subfolder` that leaves the folder.
        OSError: the Hub cannot be reached and its cache has no copy.
    """
    for name, value in (("weight_name", weight_name), ("subfolder", subfolder)):
        if value is not None and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise ValueError(f"{name}={value!r} leads out of the folder")
    path = Path(source)
    if path.is_file():
        return read_adapter_file(path)
    if path.is_dir():
        return _from_folder(path / subfolder if subfolder else path, weight_name)
    if not HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"{source}: no such file or folder, and not the id of a Hub repository (owner/name)")
    options = {
        "subfolder": subfolder,
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    return _from_hub(str(source), weight_name, options)


def _from_folder(folder: Path, weight_name: str | None) -> AdapterFile:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path = folder / (weight_name or WEIGHTS_NAME)
    if path.is_file():
        return read_adapter_file(path)
    if weight_name is None and (folder / PEFT_CONFIG_NAME).is_file() and (folder / PEFT_WEIGHTS_NAME).is_file():
        return read_peft_folder(folder)
    pickles = sorted(p.name for p in folder.iterdir() if is_pickle_by_name(p))
    if pickles:
        raise EtherFileError(f"{folder} has no {path.name}, only {', '.join(pickles)}: pickles are not read")
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    hint = f"; it holds {', '.join(others)}: pass one as weight_name" if others else ""
    raise FileNotFoundError(f"{folder} has no {path.name}{hint}")


def _from_hub(repo_id: str, weight_name: str | None, options: dict) -> AdapterFile:
    wanted = weight_name or WEIGHTS_NAME
    if is_pickle_by_name(wanted):
        raise EtherFileError(f"{repo_id}: {wanted} is a pickle by its name, and pickles are not read")
    try:
        return read_adapter_file(Path(hf_hub_download(repo_id, wanted, **options)))
    except LocalEntryNotFoundError as error:
        if weight_name is None and (cached := _cached_peft_folder(repo_id, options)):
            return read_peft_folder(cached)
        raise OSError(
            f"{repo_id}: {wanted} is not in the local cache and the Hub cannot be reached (or local_files_only is "
            "set); download it first, or pass a folder on disk"
        ) from error
    except EntryNotFoundError as error:
        if weight_name is None:
            try:
                hf_hub_download(repo_id, PEFT_CONFIG_NAME, **options)
                return read_peft_folder(Path(hf_hub_download(repo_id, PEFT_WEIGHTS_NAME, **options)).parent)
            except EntryNotFoundError:
                pass  # neither layout is there: say what was looked for first
        raise FileNotFoundError(f"{repo_id} on the Hub has no {wanted}; name the file with weight_name") from error
    except HfHubHTTPError as error:
        raise OSError(f"{repo_id} on the Hub: {error}") from error


def _cached_peft_folder(repo_id: str, options: dict) -> Path | None:
    offline = options | {"local_files_only": True, "force_download": False}
    try:
        hf_hub_download(repo_id, PEFT_CONFIG_NAME, **offline)
        return Path(hf_hub_download(repo_id, PEFT_WEIGHTS_NAME, **offline)).parent
    except LocalEntryNotFoundError:
        return None
