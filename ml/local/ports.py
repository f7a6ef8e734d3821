"""Free ports on this machine, kept for one stack until its servers listen on them."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ml.core.errors import StackError

HOST = "127.0.0.1"

_TRIES_FOR_A_PORT = 20


@contextmanager
def free_ports(*preferred: int) -> Iterator[list[int]]:
    """A port on 127.0.0.1 nobody listens on for each preference; 0, or one that is taken: any. All are different.

    Within the block no other stack on this machine is given them. Servers take half a minute until they listen, and of
    two that were told the same port, the one would otherwise take the other's server for its own.
    """
    with ExitStack() as reservations:
        ports = []
        for port in preferred:
            ports.append(_reserve(port, reservations) or _reserve(0, reservations) or _no_port())
        yield ports


def _reserve(wanted: int, reservations: ExitStack) -> int | None:
    """Reserve a port (0: any) by a name that the kernel gives to one process, and takes back when that ends."""
    for _ in range(_TRIES_FOR_A_PORT):
        found = _bind(wanted)
        if found is None:
            return None
        with found:
            port = int(found.getsockname()[1])
            name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                name.bind(f"\0breakhis-port-{port}")  # abstract: a name without a file, for every user of the machine
            except OSError:
                name.close()
            else:
                reservations.enter_context(name)
                return port
        if wanted:
            return None
    return None


def _bind(port: int) -> socket.socket | None:
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # As servers do: connections of the last run that linger in TIME_WAIT do not count as taken.
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind((HOST, port))
        s.listen(1)  # Linux lets two sockets with SO_REUSEADDR bind, but only one listen
    except OSError:
        s.close()
        return None
    return s


def _no_port() -> int:
    raise StackError(f"no port on {HOST} can be listened on")
