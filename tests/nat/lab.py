"""A laboratory of kernel NATs: one public network and homes behind NATs of every kind, in network namespaces.

    public namespace: a bridge with 11.0.0.10 .. 11.0.0.29     each DHT node has an address of its own
      |                    |
    NAT 11.0.1.1      host 11.0.1.2 (open)
      |
    host 192.168.1.10

Everything a laboratory makes has its process id in its name; `remove_stale` clears what a killed run left.
"""

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

Kind = Literal["open", "cone", "symmetric"]

KINDS: Final[tuple[Kind, ...]] = ("open", "cone", "symmetric")
"""What stands before a host: nothing; a NAT that keeps the port, one mapping for all peers; one with a random port
for each peer. Both NATs let in only answers from the address and port that were sent to."""

PREFIX: Final = "p2pnat"
PUBLIC_HOSTS: Final = tuple(f"11.0.0.{number}" for number in range(10, 30))
"""Addresses of the public namespace: neither private nor reserved, so that both implementations take them for real."""

MIN_TTL: Final = 16
"""What arrives with fewer hops left is dropped: the real network is longer than this one, low-TTL probes end in it."""

CLONE_NEWNET: Final = 0x40000000  # linux/sched.h


def missing_tools() -> str | None:
    """Say why there can be no laboratory here, or None if there can."""
    if os.geteuid() != 0:
        return "not root, so there are no network namespaces: NO NAT IS TESTED"
    for tool in ("ip", "nft"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: NO NAT IS TESTED"
    return None


def in_namespace(namespace: str, argv: Sequence[str]) -> list[str]:
    """Return a command line that runs `argv` in a namespace."""
    return ["ip", "netns", "exec", namespace, *argv]


def _run(argv: Sequence[str], text: str = "") -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def _ip(*commands: str, namespace: str | None = None) -> None:
    """Run `ip` commands in one go."""
    where = [] if namespace is None else ["-netns", namespace]
    _run(["ip", *where, "-batch", "-"], "\n".join(commands) + "\n")


def _nft(namespace: str, rules: str) -> None:
    _run(in_namespace(namespace, ["nft", "-f", "-"]), rules)


def socket_in(namespace: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """Make a socket in another namespace, where it stays whoever uses it."""

    def make() -> socket.socket:
        with Path("/run/netns", namespace).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"no namespace {namespace}")
        return socket.socket(family, kind, protocol)

    # A thread has a namespace of its own; this one ends with it.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run(["ip", "netns", "list"]).splitlines() if line.strip()]


def _remove(namespace: str) -> None:
    """Remove a namespace; whatever still runs in it is killed, or it would live on without a name."""
    with contextlib.suppress(RuntimeError):
        for pid in _run(["ip", "netns", "pids", namespace]).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip(f"netns del {namespace}")


def remove_stale() -> None:
    """Remove the namespaces of laboratories whose process is gone."""
    for name in _namespaces():
        prefix, _, rest = name.partition("-")
        pid = rest.partition("-")[0]
        if prefix == PREFIX and pid.isdigit() and not Path("/proc", pid).exists():
            _remove(name)


@dataclass
class Home:
    """A host and what stands before it. `address` is the host's own, `public` the one others see."""

    lab: "Lab"
    kind: Kind
    number: int
    namespace: str
    nat: str | None
    """The NAT's namespace; its interfaces are `wan` and `lan`."""
    address: str
    public: str
    loss: float = 0.0
    _forwards: dict[int, int] = field(default_factory=dict)
    _zone: int = 1

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return a command line that runs on the host."""
        return in_namespace(self.namespace, argv)

    def lose(self, probability: float) -> None:
        """Lose that part of all UDP datagrams from here on, each way."""
        self.loss = probability
        self._set_rules()

    def bound_ports(self) -> set[int]:
        """Return the UDP ports that are bound on the host."""
        lines = _run(self.command(["cat", "/proc/net/udp"])).splitlines()[1:]
        return {int(line.split()[1].partition(":")[2], 16) for line in lines}

    def move_ports(self) -> dict[int, int]:
        """Have the NAT forget its mappings and give each bound port a new public one; returns which."""
        former = self._forwards.values()
        unused = (port for port in range(20_000, 30_000) if port not in former)
        self._forwards = {port: next(unused) for port in sorted(self.bound_ports())}
        self._forget()
        return self._forwards

    def move_public(self) -> None:
        """Give the NAT another public address, as a provider does over night; the old mappings end."""
        assert self.nat is not None
        former, self.public = self.public, self.lab.next_public()
        _ip(f"addr del {former}/16 dev wan", f"addr add {self.public}/16 dev wan", namespace=self.nat)
        self._forget()

    def move_address(self) -> None:
        """Give the host another address in its network, as another access point does."""
        if self.nat is None:
            new, bits, route = self.lab.next_public(), 16, []
            self.public = new
        else:
            head, _, last = self.address.rpartition(".")
            new, bits, route = f"{head}.{int(last) + 1}", 24, [f"route add default via {head}.1"]
        commands = [f"addr del {self.address}/{bits} dev eth0", f"addr add {new}/{bits} dev eth0", *route]
        _ip(*commands, namespace=self.namespace)
        self.address = new

    def narrow(self, mtu: int) -> None:
        """Let the NAT carry no larger packets from here on; it fragments those that may be."""
        assert self.nat is not None
        _ip(*(f"link set {device} mtu {mtu}" for device in ("wan", "lan")), namespace=self.nat)

    def _forget(self) -> None:
        # What was mapped in another zone is unknown in this one, at once. An interface that goes down has its mappings
        # dropped too, but later, and not at all while the kernel is busy with other interfaces (nf_nat_masquerade.c).
        self._zone += 1
        self._set_rules()

    def _set_rules(self) -> None:
        if self.nat is None:
            _nft(self.namespace, _OPEN_RULES.format(min_ttl=MIN_TTL, loss=self._loss_rule()))
            return
        # Bound ports are few; a socket bound later keeps its port, which is a mapping as good as any.
        forwards = ", ".join(f"{port} : {new}" for port, new in self._forwards.items())
        rules = _NAT_RULES.format(
            zone=self._zone,
            min_ttl=MIN_TTL,
            loss=self._loss_rule(),
            moved=f"oifname wan meta l4proto udp masquerade to : udp sport map {{ {forwards} }}" if forwards else "",
            option="fully-random" if self.kind == "symmetric" else "",
        )
        _nft(self.nat, rules)

    def _loss_rule(self) -> str:
        return f"meta l4proto udp numgen random mod 10000 < {round(self.loss * 10_000)} drop" if self.loss else ""


# A table that is declared, deleted and declared again replaces whatever it was before, in one transaction. What an
# output chain drops is an error to the sender; what is dropped on egress is lost without a word, as on a wire.
_OPEN_RULES = """
table ip lab
delete table ip lab
table ip lab {{
    chain input {{
        type filter hook input priority 0
        ip ttl < {min_ttl} drop
        {loss}
    }}
}}
table netdev lab
delete table netdev lab
table netdev lab {{
    chain egress {{
        type filter hook egress device eth0 priority 0
        {loss}
    }}
}}
"""

# Unsolicited datagrams end on the NAT's input chain. Were they answered or taken in, their connection tracking entries
# would occupy ports, and the mapping towards that very peer would move.
_NAT_RULES = """
table ip lab
delete table ip lab
table ip lab {{
    chain prerouting {{
        type filter hook prerouting priority -300
        ct zone set {zone}
        iifname wan ip ttl < {min_ttl} drop
    }}
    chain input {{
        type filter hook input priority 0
        iifname wan drop
    }}
    chain forward {{
        type filter hook forward priority 0
        iifname wan ct state new drop
        {loss}
    }}
    chain postrouting {{
        type nat hook postrouting priority 100
        {moved}
        oifname wan masquerade {option}
    }}
}}
"""


class Lab:
    """The public network and its homes; `close` removes everything, and so does leaving the `with` block."""

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self._prefix = f"{PREFIX}-{os.getpid()}-{next(self._numbers)}"
        self._made: list[str] = []
        self._publics = (f"11.0.{net}.{number}" for net in range(1, 250) for number in range(1, 250))
        self._homes = itertools.count(1)
        self.public = self._make("public")
        """The public namespace."""
        hosts = [f"addr add {host}/16 dev hub" for host in PUBLIC_HOSTS]
        # By itself a bridge takes the lowest address of its ports, so each new home would make others forget the way.
        _ip("link add hub address 02:00:00:00:00:01 type bridge", *hosts, "link set hub up", namespace=self.public)

    def _make(self, name: str) -> str:
        namespace = f"{self._prefix}-{name}"
        self._made.append(namespace)
        _ip(f"netns add {namespace}")
        _ip("link set lo up", namespace=namespace)
        return namespace

    def next_public(self) -> str:
        """Return a public address that nobody has had yet."""
        return next(self._publics)

    def home(self, kind: Kind) -> Home:
        """Make a host with that kind of NAT before it."""
        number, public = next(self._homes), self.next_public()
        namespace = self._make(f"host{number}")
        if kind == "open":
            self._plug(number, namespace, "eth0", public)
            home = Home(self, kind, number, namespace, None, public, public)
        else:
            nat = self._make(f"nat{number}")
            self._plug(number, nat, "wan", public)
            network = f"192.168.{number}" if number < 256 else f"10.{number // 256 % 256}.{number % 256}"
            address = f"{network}.10"
            self._wire(nat, namespace, f"{network}.1", address)
            home = Home(self, kind, number, namespace, nat, address, public)
        home._set_rules()
        return home

    def _plug(self, number: int, namespace: str, device: str, address: str) -> None:
        _ip(f"link add {device} netns {namespace} type veth peer name port{number} netns {self.public}")
        _ip(f"link set port{number} master hub up", namespace=self.public)
        _ip(f"addr add {address}/16 dev {device}", f"link set {device} up", namespace=namespace)

    def _wire(self, nat: str, host: str, gateway: str, address: str) -> None:
        _ip(f"link add lan netns {nat} type veth peer name eth0 netns {host}")
        _ip(f"addr add {gateway}/24 dev lan", "link set lan up", namespace=nat)
        route = f"route add default via {gateway}"
        _ip(f"addr add {address}/24 dev eth0", "link set eth0 up", route, namespace=host)
        _run(in_namespace(nat, ["sysctl", "-qw", "net.ipv4.ip_forward=1"]))

    def remove(self, home: Home) -> None:
        """Remove a home and whatever still runs in it."""
        for namespace in (home.namespace, home.nat):
            if namespace is not None:
                self._made.remove(namespace)
                _remove(namespace)

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return a command line that runs in the public network."""
        return in_namespace(self.public, argv)

    def close(self) -> None:
        """Remove every namespace and whatever still runs in it."""
        while self._made:
            _remove(self._made.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
