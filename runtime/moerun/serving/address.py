"""The address that the server listens on, taken before anything that takes seconds."""

from __future__ import annotations

import socket

from moerun.errors import RunError


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to until the server listens. Raises RunError.

    Taken before a model is loaded, so that an address that cannot be had is known at once.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"cannot listen on {host}:{port}: {reason}") from error
    return taken


def address_of(taken: socket.socket) -> str:
    """URL of a listening socket."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
