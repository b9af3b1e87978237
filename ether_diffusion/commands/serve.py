"""Answer requests for images over HTTP, in OpenAI's form, each with adapters of its own, in mixed batches.

  ether-diffusion serve --base M --adapters adapters
  ether-diffusion serve --base M --adapters adapters --host 0.0.0.0 --token_file tokens.txt --uploads
  ether-diffusion serve --base M --adapters /shared/adapters --engine ray --replicas 2:8

Any client of OpenAI's images API works: model "base:dog" is the base with the adapter dog. Adapters are files
NAME.safetensors or folders of that name in --adapters; the folder is looked at for every request, so that what is put
there is served at once. SIGTERM or Ctrl-C ends it when what it took is answered. docs/serving-http.md has examples.

It needs the extra: pip install "ether-diffusion[serve]"; with --engine ray also "ether-diffusion[ray]".
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from ether_diffusion.base_models import MINIATURE, open_for_inference
from ether_diffusion.commands.base_version import add_base_version_arguments
from ether_diffusion.commands.max_batch import add_max_batch_argument
from ether_diffusion.dtypes import DTYPES
from ether_diffusion.errors import InputError
from ether_diffusion.server.address import bound_socket, check_port
from ether_diffusion.serving.limits import HOST_BYTES, MAX_LINE

if TYPE_CHECKING:
    from ether_diffusion.server.settings import ServerSettings

LOCAL = ("127.0.0.1", "localhost", "::1")
MIB = 2**20
MODULES = {"fastapi": "serve", "uvicorn": "serve", "python_multipart": "serve", "prometheus_client": "serve"}
"""Module -> the extra that brings it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", default=MINIATURE, help="A pipeline, a folder or an id on the Hub. Default: %(default)s."
    )
    add_base_version_arguments(parser)
    parser.add_argument("--adapters", type=Path, help="Folder of adapters: NAME.safetensors, or folders of that name.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: %(default)s.")
    parser.add_argument("--port", type=int, default=8000, help="Default: %(default)s.")
    add_max_batch_argument(parser)
    parser.add_argument("--max_line", type=int, default=MAX_LINE, help="Images that may wait. Default: %(default)s.")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="Seconds that a request may take. Default: %(default)s."
    )
    parser.add_argument("--token_file", type=Path, help="A token in each line; without one of them nobody is let in.")
    parser.add_argument(
        "--token_limit", type=int, default=16, help="Images of a token in line or running. Default: %(default)s."
    )
    parser.add_argument("--uploads", action="store_true", help="Let adapters be uploaded and deleted.")
    parser.add_argument(
        "--max_upload", metavar="MIB", type=int, default=256, help="Of an uploaded adapter. Default: %(default)s."
    )
    parser.add_argument(
        "--host_memory",
        metavar="MIB",
        type=int,
        default=HOST_BYTES // MIB,
        help="Main memory for adapters. Default: %(default)s.",
    )
    parser.add_argument(
        "--hang_after",
        type=float,
        default=300.0,
        help="Seconds of one forward after which the server is called dead. Default: %(default)s.",
    )
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="This process, or replicas on a Ray cluster."
    )
    parser.add_argument("--replicas", metavar="MIN:MAX", help="With --engine ray. Default: 1:1.")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="Default: float16 on a GPU, else float32.")


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        InputError: flags that cannot be used, or a package that is missing; nothing is loaded then.
        OSError: the base or the file of tokens cannot be read.
    """
    check_packages(args.engine)
    settings = check_flags(args)
    if args.engine == "ray":
        from ether_diffusion.server.ray_serve import RayArguments, serve_on_ray

        low, high = read_replicas(args.replicas or "1:1")
        given = {name: value for name, value in vars(args).items() if name in RayArguments.model_fields}
        serve_on_ray(RayArguments(**given, min_replicas=low, max_replicas=high), host=args.host, port=args.port)
        return

    from ether_diffusion.server.run import serve

    with bound_socket(args.host, args.port) as address:
        serve(
            lambda: open_for_inference(args.base, dtype=args.dtype, variant=args.variant, revision=args.revision),
            address,
            settings,
            max_batch=args.max_batch,
            max_line=args.max_line,
            host_bytes=args.host_memory * MIB,
        )


def check_packages(engine: str) -> None:
    """Raises InputError for a package that is missing; says what to install."""
    needed = {**MODULES, "ray": "ray"} if engine == "ray" else MODULES
    for module, extra in needed.items():
        if importlib.util.find_spec(module) is None:
            raise InputError(f'the package {module} is missing; pip install "ether-diffusion[{extra}]"')
    if engine == "ray":
        try:
            importlib.import_module("ray.serve")
        except ImportError as error:  # ray is there, but not all that its "serve" extra brings
            raise InputError(f'Ray Serve is not complete ({error.name}); pip install "ether-diffusion[ray]"') from None


def check_flags(args: argparse.Namespace) -> ServerSettings:
    """The settings that the flags give. Raises `InputError` where they cannot be used."""
    from ether_diffusion.server.settings import ServerSettings
    from ether_diffusion.server.tokens import read_tokens
    from ether_diffusion.serving.checks import check_count

    check_port(args.port)
    for name in ("max_line", "max_upload", "host_memory", "token_limit"):
        check_count(f"--{name}", getattr(args, name))
    if args.max_batch != "auto":
        check_count("--max_batch", args.max_batch, or_else=", or auto")
    if args.replicas is not None:
        if args.engine != "ray":
            raise InputError("--replicas: belongs to --engine ray; this machine has one")
        read_replicas(args.replicas)
    tokens = frozenset() if args.token_file is None else read_tokens(args.token_file)
    if args.uploads and not tokens and args.host not in LOCAL:
        raise InputError(f"--uploads with --host {args.host}: anybody could change adapters; needs --token_file")
    return ServerSettings(
        adapters=args.adapters,
        timeout=args.timeout,
        tokens=tokens,
        token_limit=args.token_limit,
        uploads=args.uploads,
        max_upload=args.max_upload * MIB,
        hang_after=args.hang_after,
    )


def read_replicas(word: str) -> tuple[int, int]:
    """The least and the most replicas of "MIN:MAX". Raises `InputError` for anything else."""
    low, colon, high = word.partition(":")
    if not (colon and low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise InputError(f"--replicas: got {word!r}, needs two whole numbers from 1, as 2:8")
    return int(low), int(high)
