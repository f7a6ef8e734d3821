"""Ports that are free, or are held by a stack that is starting."""

import socket
import subprocess
import sys

from ml.local.ports import free_ports


def test_a_preferred_port_is_taken_if_it_is_free() -> None:
    with free_ports(0) as [free]:
        pass
    with free_ports(free) as again:
        assert again == [free]


def test_a_port_somebody_listens_on_is_left_alone() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        with socket.create_server((host, 0)) as server:
            taken = server.getsockname()[1]
            with free_ports(taken) as [other]:
                assert other != taken


def test_ports_are_all_different() -> None:
    with free_ports(0) as [free]:
        pass
    with free_ports(free, free, 0, 0) as ports:
        assert len(set(ports)) == 4


def test_a_port_of_a_stack_that_is_starting_is_left_alone() -> None:
    ask = "import sys; from ml.local.ports import free_ports\nwith free_ports(int(sys.argv[1])) as [port]: print(port)"
    with free_ports(0) as [held]:
        other = subprocess.run([sys.executable, "-c", ask, str(held)], capture_output=True, text=True, check=True)
        assert int(other.stdout) != held
    again = subprocess.run([sys.executable, "-c", ask, str(held)], capture_output=True, text=True, check=True)
    assert int(again.stdout) == held
