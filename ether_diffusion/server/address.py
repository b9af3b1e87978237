"""The address of a server, found out before a model is loaded: can it be had?"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from ether_diffusion.errors import InputError


def check_port(port: int) -> None:
    """Raises `InputError` for a number that no port has."""
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port {port}: needs a number from 0 to 65535")


@contextlib.contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has the address and does not listen yet. Port 0 is any that is free.

    Raises:
        InputError: it cannot be had.
    """
    check_port(port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((host, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            hint = "; take another --port, or 0 for any that is free" if taken else ""
            raise InputError(f"--host {host} --port {port}: {error.strerror or error}{hint}") from error
        yield made
