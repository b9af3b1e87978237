"""Generate images, each with an adapter of its own, in mixed batches; over processes and machines by Accelerate.

  ether-diffusion generate --base M --adapters adapters --prompts prompts.jsonl --output_dir out
  ether-diffusion generate --base M --adapters adapters --adapter dog --prompt "a photo of sks dog" --output_dir out
  accelerate launch -m ether_diffusion.commands.main generate --base M … (the same flags)

--prompts is a file with one JSON object in each line: prompt, and at will adapter (a name in --adapters, or names with
strengths), strength, negative_prompt, seed, steps, guidance, size ("768x512"). The flags --seed, --steps, --guidance,
--size and --negative_prompt hold where a line leaves them out; a line without a seed has --seed plus its number.
Each image goes to --output_dir under a name that its settings alone decide, with the settings in it. The same command
goes on where it was stopped: images that are there are not made again. index.jsonl says which line has which file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ether_diffusion.base_models import MINIATURE, open_for_inference
from ether_diffusion.commands.base_version import add_base_version_arguments
from ether_diffusion.commands.max_batch import add_max_batch_argument
from ether_diffusion.dtypes import DTYPES
from ether_diffusion.errors import InputError
from ether_diffusion.files import replace_file

if TYPE_CHECKING:
    import torch

    from ether_diffusion.serving.engine import Engine
    from ether_diffusion.serving.lines import ImageRequest

INDEX_NAME = "index.jsonl"
IN_LINE = 32
"""Requests that wait beside those that run: enough to fill every batch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", default=MINIATURE, help="A pipeline, a folder or an id on the Hub. Default: %(default)s."
    )
    add_base_version_arguments(parser)
    parser.add_argument("--adapters", type=Path, help="Folder of adapters: NAME.safetensors, or folders of that name.")
    parser.add_argument("--prompts", type=Path, help="File with one JSON object in each line.")
    parser.add_argument("--prompt", help="In place of --prompts: one prompt.")
    parser.add_argument(
        "--adapter", metavar="NAME[=STRENGTH]", action="append", help="With --prompt; may be repeated."
    )
    parser.add_argument("--num_images", type=int, default=1, help="With --prompt: images, of consecutive seeds.")
    parser.add_argument("--negative_prompt")
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    parser.add_argument("--steps", type=int, help="Default: the pipeline's.")
    parser.add_argument("--guidance", type=float, help="Default: the pipeline's.")
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", help="In pixels. Default: the pipeline's.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the images, made if need be.")
    add_max_batch_argument(parser)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="Default: float16 on a GPU, else float32.")


def run(args: argparse.Namespace) -> None:
    """Generate all images of this process.

    Raises:
        InputError: flags or lines that cannot be used (nothing is loaded then), or requests that failed.
        OSError: files that cannot be read or written.
    """
    from accelerate import PartialState

    from ether_diffusion.serving.lines import adapter_names, shard

    requests = read_requests(args)
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise InputError(f"--output_dir {args.output_dir}: is a file, needs a folder")
    check_adapters(args.adapters, adapter_names(requests))
    state = PartialState()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        write_index(args.output_dir, requests)
    own = shard(requests, state.process_index, state.num_processes)
    missing = [request for request in own if not (args.output_dir / request.file_name).exists()]
    bar = tqdm(total=len(own), initial=len(own) - len(missing), unit="image", disable=not state.is_main_process)
    with bar:
        failed = generate(args, state.device, missing, bar) if missing else {}
    if failed:
        request, error = next(iter(failed.items()))
        raise InputError(f"{len(failed)} of {len(own)} images failed; the first, {request.prompt!r}: {error}")
    if state.is_main_process:
        print(args.output_dir)


def read_requests(args: argparse.Namespace) -> list[ImageRequest]:
    """What the flags ask for. Raises `InputError` where they cannot be used."""
    from ether_diffusion.serving.lines import make_request, read_lines

    if (args.prompts is None) == (args.prompt is None):
        raise InputError("--prompts: give it or --prompt, one of the two")
    names = ("negative_prompt", "seed", "steps", "guidance", "size")
    defaults = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.prompts is not None:
        if args.adapter or args.num_images != 1:
            raise InputError("--adapter, --num_images: belong to --prompt; in a file each line has its own adapter")
        return read_lines(args.prompts, defaults)
    if args.num_images < 1:
        raise InputError(f"--num_images: got {args.num_images}, needs 1 or more")
    values = {"prompt": args.prompt, "adapter": dict(map(_read_adapter, args.adapter or ()))}
    seeds = range(args.seed, args.seed + args.num_images)
    return [make_request({**values, "seed": seed}, "--prompt", defaults) for seed in seeds]


def check_adapters(folder: Path | None, names: Sequence[str]) -> None:
    """Make sure that all adapters are there. Raises `InputError` where one is not."""
    from ether_diffusion.serving.catalogue import FolderCatalogue

    if folder is None:
        if names:
            raise InputError(f"--adapters: missing; the adapter {names[0]} is asked for, needs the folder it is in")
        return
    catalogue = FolderCatalogue(folder)
    for name in names:
        catalogue.find(name)


def write_index(folder: Path, requests: Sequence[ImageRequest]) -> None:
    """Write which line has which file."""
    lines = ({"file_name": each.file_name, **settings_of(each)} for each in requests)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    replace_file(folder / INDEX_NAME, text.encode())


def settings_of(request: ImageRequest) -> dict[str, Any]:
    """What a request says, without what it leaves to the pipeline."""
    size = None if request.size is None else "x".join(map(str, request.size))
    values = {"prompt": request.prompt, "adapter": dict(request.adapters), "negative_prompt": request.negative_prompt}
    values |= {"seed": request.seed, "steps": request.steps, "guidance": request.guidance, "size": size}
    return {name: value for name, value in values.items() if value not in (None, {})}


def generate(
    args: argparse.Namespace, device: torch.device, requests: Sequence[ImageRequest], bar: tqdm
) -> dict[ImageRequest, Exception]:
    """Generate and write the images; those that failed, and why."""
    from ether_diffusion.serving.engine import Engine
    from ether_diffusion.serving.png import image_settings, sampling_defaults, write_png

    version = {"variant": args.variant, "revision": args.revision}
    pipe = open_for_inference(args.base, dtype=args.dtype, device=device, **version)
    defaults = sampling_defaults(pipe)
    failed: dict[ImageRequest, Exception] = {}
    with Engine(pipe, args.adapters, max_batch=args.max_batch, max_line=IN_LINE) as engine:
        for request, future in _finished(engine, requests):
            bar.update()
            try:
                (image,) = future.result().images
            except Exception as error:  # of this request alone; the others go on
                failed[request] = error
                continue
            settings = image_settings(
                image,
                prompt=request.prompt,
                seed=request.seed,
                adapters=request.adapters,
                arguments=request.arguments,
                defaults=defaults,
            )
            write_png(args.output_dir / request.file_name, image, settings)
    return failed


def _finished(engine: Engine, requests: Sequence[ImageRequest]) -> Iterator[tuple[ImageRequest, Future]]:
    """Submit all requests, and give each as soon as it is done, failed or refused."""
    open_jobs: dict[Future, ImageRequest] = {}
    for request in requests:
        while len(open_jobs) >= IN_LINE:
            yield from _done_of(open_jobs)
        try:
            open_jobs[engine.submit(**request.arguments).future] = request
        except (ValueError, OSError) as error:
            refused = Future()
            refused.set_exception(error)
            yield request, refused
    while open_jobs:
        yield from _done_of(open_jobs)


def _done_of(open_jobs: dict[Future, ImageRequest]) -> Iterator[tuple[ImageRequest, Future]]:
    done, _ = wait(open_jobs, return_when=FIRST_COMPLETED)
    for future in done:
        yield open_jobs.pop(future), future


def _read_adapter(word: str) -> tuple[str, float]:
    name, equals, strength = word.rpartition("=")
    try:
        return (name, float(strength)) if equals else (word, 1.0)
    except ValueError:
        raise InputError(f"--adapter: got {word!r}, needs NAME or NAME=STRENGTH") from None
