"""Which ports a node binds, and which ones again after a sleep."""

import random

import pytest
from sim import SimNetwork, run

from p2pclaude.hyperdht.net.endpoint import Endpoint
from p2pclaude.hyperdht.node.ports import PORT_TRIES, Ports


def ports(endpoint: Endpoint, port: int, *, any_port: bool = True) -> Ports:
    """Give the ports of a node on an endpoint."""
    return Ports(endpoint, "0.0.0.0", port, any_port=any_port)


def test_the_next_free_port_is_taken_and_any_if_there_is_none() -> None:
    async def main() -> None:
        endpoint = Endpoint(SimNetwork().host("5.5.5.5"), random.Random(1))
        taken = [await endpoint.bind("0.0.0.0", 1000)]
        made = ports(endpoint, 1000)
        server, client = await made.bind()
        assert server.address[1] == 1001 and client.address[1] not in (0, 1000, 1001)
        assert made.bound == (1001, client.address[1])
        taken += [await endpoint.bind("0.0.0.0", port) for port in range(1002, 1000 + PORT_TRIES)]
        server, _ = await ports(endpoint, 1000).bind()
        assert server.address[1] not in range(1000, 1000 + PORT_TRIES)

    run(main())


def test_a_port_that_must_be_this_one_is_refused_when_it_is_taken() -> None:
    async def main() -> None:
        endpoint = Endpoint(SimNetwork().host("5.5.5.5"), random.Random(1))
        await endpoint.bind("0.0.0.0", 1000)
        with pytest.raises(OSError):
            await ports(endpoint, 1000, any_port=False).bind()
        assert len(endpoint.sockets) == 1

    run(main())


@pytest.mark.parametrize("wanted", [0, 1000])
def test_the_same_ports_again(wanted: int) -> None:
    async def main() -> None:
        endpoint = Endpoint(SimNetwork().host("5.5.5.5"), random.Random(1))
        made = ports(endpoint, wanted)
        first = await made.bind()
        bound = made.bound
        for socket in first:
            socket.close()
        again = await made.bind()
        assert made.bound == bound and [socket.address[1] for socket in again] == list(bound)
        for socket in again:
            socket.close()
        await endpoint.bind("0.0.0.0", bound[0])  # somebody took it meanwhile
        server, client = await made.bind()
        assert server.address[1] != bound[0] and client.address[1] == bound[1]

    run(main())


def test_a_client_port_that_is_not_to_be_had_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        endpoint = Endpoint(SimNetwork().host("5.5.5.5"), random.Random(1))
        bind, count = endpoint.bind, 0

        async def fail_second(host: str, port: int) -> object:
            nonlocal count
            count += 1
            if count > 1:
                raise OSError("too many open files")
            return await bind(host, port)

        monkeypatch.setattr(endpoint, "bind", fail_second)
        with pytest.raises(OSError):
            await ports(endpoint, 1000).bind()
        assert not endpoint.sockets

    run(main())
