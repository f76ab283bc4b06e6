"""Tests of the network between hosts."""

import contextlib
import socket

import pytest

from tests.campaign.network import ADDRESSES, Network


def test_nothing_passes_a_link_that_is_cut() -> None:
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(Network())
        except OSError as error:
            pytest.skip(f"no network can be created: {error}")
        with network.enter(0):
            server = stack.enter_context(socket.create_server((ADDRESSES[0], 0)))
        address = server.getsockname()
        with network.enter(1):
            stack.enter_context(socket.create_connection(address, timeout=10))
        network.cut()
        with network.enter(1), pytest.raises(OSError, match="unreachable"):
            socket.create_connection(address, timeout=10)
