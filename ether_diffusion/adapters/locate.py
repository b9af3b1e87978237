"""Find an adapter: a file, a folder, or a repository on the Hub."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ether_diffusion.adapters.reading import (
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    is_pickle_by_name,
    read_adapter_file,
    read_peft_folder,
)
from ether_diffusion.adapters.schema import WEIGHTS_NAME, AdapterFile
from ether_diffusion.base_models import missing_locally
from ether_diffusion.errors import EtherFileError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubSource:
    """Which version of a repository on the Hub, and how to get at it: as for `from_pretrained`."""

    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False


def find_adapter_file(
    source: str | Path,
    *,
    weight_name: str | None = None,
    hub: HubSource = HubSource(),  # noqa: B008  (it is frozen)
) -> AdapterFile:
    """Read the adapter at `source`: a file or folder on disk, else an id on the Hub.

    Args:
        weight_name: the file's name in a folder or repository. A folder's only .safetensors file needs none.
        hub: the subfolder counts for folders on disk too.

    Raises:
        FileNotFoundError: nothing there; says what was looked for.
        EtherFileError: a file that cannot be loaded.
        ValueError: a `weight_name` or `subfolder` that leaves the folder.
        OSError: the Hub cannot be reached and its cache has no copy.
    """
    for name, value in (("weight_name", weight_name), ("subfolder", hub.subfolder)):
        if value is not None and (Path(value).is_absolute() or ".." in Path(value).parts):
            raise ValueError(f"{name}={value!r} leads out of the folder")
    path = Path(source)
    if path.is_file():
        return read_adapter_file(path)
    if path.is_dir():
        return _from_folder(path / hub.subfolder if hub.subfolder else path, weight_name)
    if "/" in str(source) and (problem := missing_locally(source, "file or folder")):
        raise FileNotFoundError(f"{source}: {problem}")
    if not HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"{source}: no such file or folder, and not the id of a Hub repository (owner/name)")
    return _from_hub(str(source), weight_name, hub)


def _from_folder(folder: Path, weight_name: str | None) -> AdapterFile:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path = folder / (weight_name or WEIGHTS_NAME)
    if path.is_file():
        return read_adapter_file(path)
    if weight_name is None and (folder / PEFT_CONFIG_NAME).is_file() and (folder / PEFT_WEIGHTS_NAME).is_file():
        return read_peft_folder(folder)
    others = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if weight_name is None and len(others) == 1:
        return read_adapter_file(others[0])
    pickles = sorted(p.name for p in folder.iterdir() if is_pickle_by_name(p))
    if pickles and not others:
        raise EtherFileError(f"{folder} has no {path.name}, only {', '.join(pickles)}: pickles are not read")
    hint = f"; it holds {', '.join(p.name for p in others)}: pass one as weight_name=" if others else ""
    raise FileNotFoundError(f"{folder} has no {path.name}{hint}")


def _from_hub(repo_id: str, weight_name: str | None, hub: HubSource) -> AdapterFile:
    wanted = [weight_name or WEIGHTS_NAME, *([] if weight_name else [PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME])]
    if is_pickle_by_name(wanted[0]):
        raise EtherFileError(f"{repo_id}: {wanted[0]} is a pickle by its name, and pickles are not read")
    options = asdict(hub)
    within = options.pop("subfolder") or ""
    try:
        folder = snapshot_download(repo_id, allow_patterns=[str(Path(within, name)) for name in wanted], **options)
        return _from_folder(Path(folder, within), weight_name)
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{repo_id}: {wanted[0]} is not in the local cache and the Hub cannot be reached (or local_files_only is "
            "set); download it first, or pass a folder on disk"
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} on the Hub has no {wanted[0]}; name the file with weight_name") from error
    except HfHubHTTPError as error:
        raise OSError(f"{repo_id} on the Hub: {error}") from error
