"""Open the web page: generate with adapters, train one from a few photos, look inside it and take it along.

  ether-diffusion demo
  ether-diffusion demo --base stable-diffusion-v1-5/stable-diffusion-v1-5 --adapters my-adapters

Without flags it uses the miniature and the adapters that come with it, and what is trained on the page is gone when
the server ends. With --adapters it is kept in that folder.

The page is for this machine alone (127.0.0.1) unless --host or --share says otherwise; then give --auth as well. It
needs the extra: pip install "ether-diffusion[demo]".
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import tempfile
import threading
from pathlib import Path

from ether_diffusion.base_models import MINIATURE, MINIATURES, base_path
from ether_diffusion.commands.base_version import add_base_version_arguments
from ether_diffusion.commands.max_batch import add_max_batch_argument
from ether_diffusion.errors import InputError
from ether_diffusion.server.address import bound_socket

HOST, PORT = "127.0.0.1", 7860
LOCAL = (HOST, "localhost", "::1")
SHIPPED = MINIATURES[MINIATURE].parent / "adapters"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        default=MINIATURE,
        help="A pipeline, a folder or an id on the Hub, or miniature-dit. Default: %(default)s.",
    )
    add_base_version_arguments(parser)
    parser.add_argument(
        "--adapters",
        type=Path,
        help="Folder of adapters, made if need be; trained ones are put there. Default: those of the miniature.",
    )
    parser.add_argument("--host", default=HOST, help=f"Address to listen on; 0.0.0.0 is every one. Default: {HOST}.")
    parser.add_argument("--port", type=int, default=PORT, help=f"Port; 0 takes any that is free. Default: {PORT}.")
    parser.add_argument("--share", action="store_true", help="Also open it to the internet, by Gradio's tunnel.")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="Ask for these.")
    add_max_batch_argument(parser)
    parser.add_argument("--device", help="Such as cpu or cuda. Default: a GPU where there is one.")


def run(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C.

    Raises:
        InputError: a flag that cannot be used, or Gradio is missing.
        OSError: the base cannot be found, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError('the package gradio is missing; pip install "ether-diffusion[demo]"')
    with bound_socket(args.host, args.port):
        pass  # Gradio binds it anew, once the base is loaded
    with tempfile.TemporaryDirectory(prefix="ether-demo-") as folder:
        serving = serve(args, Path(folder))
        print(f"ether-diffusion demo: {serving.share_url or serving.local_url}  (Ctrl-C ends it)", flush=True)
        if args.auth is None and (args.share or args.host not in LOCAL):
            print("anyone who can reach this address can use the page; --auth asks for a password", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is temporary goes then, too
        try:
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        finally:
            serving.close(verbose=False)
            serving.board.close()
            serving.trainer.close()
            serving.worker.close()


def serve(args: argparse.Namespace, folder: Path):
    """Load the base and start the server; the page, which `close` ends. `folder` holds what is temporary."""
    from ether_diffusion.demo.board import Board
    from ether_diffusion.demo.library import Library
    from ether_diffusion.demo.page import build_page
    from ether_diffusion.demo.results import Results
    from ether_diffusion.demo.server import launch
    from ether_diffusion.demo.training import Trainer
    from ether_diffusion.demo.worker import Worker

    auth = None
    if args.auth is not None:
        user, _, password = args.auth.partition(":")
        if not user or not password:
            raise InputError("--auth: needs a name and a password, as USER:PASSWORD")
        auth = (user, password)
    if args.adapters is not None:
        args.adapters.mkdir(parents=True, exist_ok=True)
        library = Library(args.adapters)
    else:
        (folder / "adapters").mkdir()
        library = Library(*([SHIPPED] if args.base == MINIATURE else []), folder / "adapters")
    worker = Worker(
        base_path(args.base),
        library,
        device=args.device,
        max_batch=args.max_batch,
        variant=args.variant,
        revision=args.revision,
    )
    # Uploads and results lie in a folder of this server's own, which nobody else on the machine can read.
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    trainer, board = Trainer(worker), Board("images", "trainings")
    results = Results(folder / "results")
    page = build_page(worker, trainer, results, board)
    launch(
        page,
        server_name=args.host,
        server_port=args.port or None,
        share=args.share,
        auth=auth,
        prevent_thread_lock=True,
    )
    page.worker, page.trainer, page.board, page.results = worker, trainer, board, results
    return page
