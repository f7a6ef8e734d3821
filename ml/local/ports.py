"""Finds free ports on this machine, and reserves them until the servers of a stack listen on them."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ml.core.errors import StackError

HOST = "127.0.0.1"

_MAX_TRIES = 20


@contextmanager
def free_ports(*preferred: int) -> Iterator[list[int]]:
    """Reserves a free port on 127.0.0.1 for each preferred one while the block runs; all of them are different.

    No other stack on this machine is given these ports within the block. Servers take half a minute until they listen;
    of two stacks with the same port, one would otherwise take the other's server for its own.

    Args:
        preferred: the ports wanted. For 0, and for a port that is taken, any free port is reserved.

    Raises:
        StackError: no port can be listened on.
    """
    with ExitStack() as reservations:
        ports = []
        for port in preferred:
            ports.append(_reserve(port, reservations) or _reserve(0, reservations) or _raise_no_port())
        yield ports


def _reserve(wanted: int, reservations: ExitStack) -> int | None:
    """Reserves a port (0: any) by a socket name, which the kernel gives to one process and frees when it ends.

    Returns:
        The port; None if it is taken.
    """
    for _ in range(_MAX_TRIES):
        listener = _listen(wanted)
        if listener is None:
            return None
        with listener:
            port = int(listener.getsockname()[1])
            reservation = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # An abstract name: it needs no file, and every user of the machine sees it.
                reservation.bind(f"\0breakhis-port-{port}")
            except OSError:
                reservation.close()
            else:
                reservations.enter_context(reservation)
                return port
        if wanted:
            return None
    return None


def _listen(port: int) -> socket.socket | None:
    """Returns a socket that listens on the port (0: any); None if the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # As servers do: connections of the last run that linger in TIME_WAIT do not count as taken.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(1)  # Linux lets two sockets with SO_REUSEADDR bind, but only one listen
    except OSError:
        listener.close()
        return None
    return listener


def _raise_no_port() -> int:
    raise StackError(f"no port on {HOST} can be listened on")
