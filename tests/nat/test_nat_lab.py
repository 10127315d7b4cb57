"""The laboratory itself: each NAT maps and filters as its kind says, measured with plain UDP sockets."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from interop.harness import environment
from nat.lab import KINDS, PUBLIC_HOSTS, Home, Kind, Lab, remove_stale, socket_in

PORT = 5000
A, B = PUBLIC_HOSTS[:2]
Address = tuple[str, int]


class Bench:
    """UDP sockets here and there, all closed in the end."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._stack = ExitStack()

    def bind(self, namespace: str, host: str = "0.0.0.0", port: int = PORT) -> socket.socket:
        """Bind a socket in a namespace."""
        sock = self._stack.enter_context(socket_in(namespace, socket.AF_INET, socket.SOCK_DGRAM))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((host, port))
        return sock

    def out(self, host: str, port: int = PORT) -> socket.socket:
        """Bind a socket in the public network."""
        return self.bind(self.lab.public, host, port)

    def close(self) -> None:
        """Close all sockets."""
        self._stack.close()


@pytest.fixture
def bench(lab: Lab) -> Iterator[Bench]:
    """Give a maker of sockets."""
    bench = Bench(lab)
    yield bench
    bench.close()


def receive(sock: socket.socket, seconds: float = 20.0) -> tuple[bytes, Address] | None:
    """Return the next datagram and its source, None when none comes in time."""
    sock.settimeout(seconds)
    try:
        data, source = sock.recvfrom(2048)
    except TimeoutError:
        return None
    return data, source


def seen_by(sock: socket.socket, sender: socket.socket) -> Address:
    """Have `sender` send to `sock` and return the address it came from."""
    sender.sendto(b"hello", sock.getsockname())
    received = receive(sock)
    assert received is not None
    return received[1]


def gets_in(sock: socket.socket, to: Address, inside: socket.socket) -> bool:
    """Tell whether a datagram reaches the socket inside, which may take its time on a busy machine."""
    sock.sendto(b"in", to)
    return receive(inside) is not None


def stays_out(sock: socket.socket, to: Address, inside: socket.socket) -> bool:
    """Tell whether a datagram does not reach the socket inside; the path is short, so it would be there soon."""
    sock.sendto(b"in", to)
    return receive(inside, 0.2) is None


@pytest.mark.parametrize("kind", KINDS)
def test_mapping(lab: Lab, bench: Bench, kind: Kind) -> None:
    home = lab.home(kind)
    inside = bench.bind(home.namespace)
    seen = [seen_by(bench.out(A, port), inside) for port in range(6000, 6005)] + [seen_by(bench.out(B), inside)]
    assert {host for host, _ in seen} == {home.public}
    ports = {port for _, port in seen}
    assert len(ports) == len(seen) if kind == "symmetric" else ports == {PORT}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_stays(lab: Lab, bench: Bench, kind: Kind) -> None:
    inside, outside = bench.bind(lab.home(kind).namespace), bench.out(A)
    assert len({seen_by(outside, inside) for _ in range(5)}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_filtering(lab: Lab, bench: Bench, kind: Kind) -> None:
    inside = bench.bind(lab.home(kind).namespace)
    asked, same_host, stranger = bench.out(A), bench.out(A, PORT + 1), bench.out(B)
    mapped = seen_by(asked, inside)
    assert gets_in(asked, mapped, inside)
    expected = gets_in if kind == "open" else stays_out
    assert expected(same_host, mapped, inside) and expected(stranger, mapped, inside)


def test_unsolicited_datagrams_do_not_move_the_mapping(lab: Lab, bench: Bench) -> None:
    home = lab.home("cone")
    inside, outside = bench.bind(home.namespace), bench.out(A)
    assert stays_out(outside, (home.public, PORT), inside)
    assert seen_by(outside, inside) == (home.public, PORT)
    assert gets_in(outside, (home.public, PORT), inside)


@pytest.mark.parametrize("kind", ["open", "cone"])
def test_low_ttl_opens_the_nat_and_does_not_arrive(lab: Lab, bench: Bench, kind: Kind) -> None:
    home, other = lab.home("cone"), lab.home(kind)
    inside, outside = bench.bind(home.namespace), bench.bind(other.namespace)
    outside.sendto(b"open", (home.public, PORT))
    inside.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 5)
    inside.sendto(b"low", (other.public, PORT))
    assert receive(outside, 0.2) is None
    assert gets_in(outside, (home.public, PORT), inside)


@pytest.mark.parametrize("kind", ["open", "cone"])
def test_loss(lab: Lab, bench: Bench, kind: Kind) -> None:
    home = lab.home(kind)
    inside, outside = bench.bind(home.namespace), bench.out(A)
    seen_by(outside, inside)  # whoever does not know the way yet keeps few datagrams until it does
    home.lose(0.3)
    for _ in range(2000):
        inside.sendto(b"out", (A, PORT))
    there = sum(1 for _ in iter(lambda: receive(outside, 0.5), None))
    for _ in range(2000):
        outside.sendto(b"in", (home.public, PORT))
    back = sum(1 for _ in iter(lambda: receive(inside, 0.5), None))
    assert 1270 < there < 1530 and 1270 < back < 1530  # six standard deviations


@pytest.mark.parametrize("kind", ["cone", "symmetric"])
def test_ports_move(lab: Lab, bench: Bench, kind: Kind) -> None:
    home = lab.home(kind)
    inside, outside = bench.bind(home.namespace), bench.out(A)
    mapped = [seen_by(outside, inside)]
    for _ in range(2):
        home.move_ports()
        assert stays_out(outside, mapped[-1], inside)
        mapped.append(seen_by(outside, inside))
        assert gets_in(outside, mapped[-1], inside)
    assert len(set(mapped)) == 3 and {host for host, _ in mapped} == {home.public}


@pytest.mark.parametrize("kind", ["cone", "symmetric"])
def test_the_public_address_moves(lab: Lab, bench: Bench, kind: Kind) -> None:
    home = lab.home(kind)
    inside, outside = bench.bind(home.namespace), bench.out(A)
    before = seen_by(outside, inside)
    home.move_public()
    assert stays_out(outside, (home.public, before[1]), inside)
    after = seen_by(outside, inside)
    assert after[0] == home.public != before[0]
    assert gets_in(outside, after, inside)


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_moves(lab: Lab, bench: Bench, kind: Kind) -> None:
    home = lab.home(kind)
    outside, inside = bench.out(A), bench.bind(home.namespace)
    before, former = seen_by(outside, inside), home.address
    home.move_address()
    after = seen_by(outside, inside)
    assert home.address != former and after[0] == home.public
    assert (after[0] == before[0]) is (kind != "open")
    assert gets_in(outside, after, inside)


HOLD = "import time; from nat.lab import Lab; lab = Lab(); lab.home('cone'); print('up', flush=True); time.sleep(60)"


def names_of(pid: int) -> list[str]:
    """Return the namespaces of a process's laboratories."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if f"-{pid}-" in name]


def test_a_killed_run_is_cleaned_up_and_a_living_one_left_alone(lab: Lab) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD], env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "up\n"
        remove_stale()
        made = names_of(holder.pid)
        assert len(made) == 3
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    remove_stale()
    assert names_of(holder.pid) == []
    assert lab.public in names_of(os.getpid())


def processes_in(namespace: str) -> list[str]:
    """Return the ids of the processes that run in a namespace."""
    argv = ["ip", "netns", "pids", namespace]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()


def test_closing_removes_everything_and_ends_what_runs_there(lab: Lab) -> None:
    with Lab() as other:
        home: Home = other.home("cone")
        sleeper = subprocess.Popen(home.command(["sleep", "60"]))
        until = time.monotonic() + 30
        while not processes_in(home.namespace) and time.monotonic() < until:
            time.sleep(0.01)
        made = [other.public, home.namespace, home.nat]
    assert sleeper.wait(30) == -signal.SIGKILL
    left = set(names_of(os.getpid()))
    assert not set(made) & left and lab.public in left
