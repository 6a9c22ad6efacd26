"""Two network namespaces connected by a veth pair: one for the scanner, one for the targets.

The scanning side has a route to the scanned side only, so nothing that runs there can reach any other address.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import shutil
import socket
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import accumulate
from pathlib import Path
from secrets import token_hex
from typing import Final, Self, TypeVar

from local.nmap import OpenPorts

NETWORK: Final = "10.77.0.0/16"
"""The addresses of the scanned side: each responds like a Linux host, unless a rule filters it."""

# Of the veth pair, from the network that is reserved for benchmarks (RFC 2544).
_SCANNER: Final = "198.18.0.1"
_SCANNED: Final = "198.18.0.2"

_RULES: Final = """\
table inet rules {
  chain input { type filter hook input priority filter; }
  chain output { type filter hook output priority filter; }
}
"""

_CLONE_NEWNET: Final = 0x40000000
_SO_TIMESTAMPNS: Final = 35
_ETH_P_IP: Final = 0x0800
_ETH_P_ALL: Final = 0x0003
_HEADER_BYTES: Final = 14 + 60 + 4  # with a packet's addresses and ports: Ethernet, the longest IPv4, ports
_CHECK_SECONDS: Final = 0.2  # interval at which a thread checks whether it must end

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, order=True)
class Packet:
    """An IPv4 packet that left the scanning side. `port` is 0 where there is none; `at` is in seconds."""

    at: float
    address: str
    protocol: int
    port: int


class Network:
    """The two namespaces, while the context lasts."""

    def __init__(self) -> None:
        name = f"scanfleet-{token_hex(4)}"
        self._scanner, self._scanned = f"{name}-a", f"{name}-b"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Create both namespaces, their link and the rules.

        Raises:
            FileNotFoundError: iproute2, nftables or util-linux is not installed.
            PermissionError: the kernel does not let this process create namespaces.
            OSError: a command failed for another reason.
        """
        with ExitStack() as stack:
            for namespace in (self._scanner, self._scanned):
                _run("ip", "netns", "add", namespace)
                stack.callback(_run, "ip", "netns", "delete", namespace)
            self._ip(self._scanner, "link", "add", "link0", "type", "veth", "peer", "link0", "netns", self._scanned)
            for namespace, address in ((self._scanner, _SCANNER), (self._scanned, _SCANNED)):
                self._ip(namespace, "address", "add", f"{address}/30", "dev", "link0")
                self._ip(namespace, "link", "set", "lo", "up")
                self._ip(namespace, "link", "set", "link0", "up")
            self._ip(self._scanner, "route", "add", NETWORK, "via", _SCANNED)
            self._ip(self._scanned, "route", "add", "local", NETWORK, "dev", "lo")
            self._nft(_RULES)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs `arguments` on the scanning side."""
        return _inside(self._scanner, *arguments)

    def nmap(self, folder: Path) -> str:
        """Return the path of a program in `folder` that is nmap on the scanning side: for SCANFLEET_NMAP."""
        program = folder / f"nmap-{self._scanner}"
        # It has priority: it takes the delays of a busy machine for those of the network, and gives up earlier.
        program.write_text(f'#!/bin/sh\nexec nice -n -10 {" ".join(self.command(_path("nmap")))} "$@"\n')
        program.chmod(0o755)
        return str(program)

    def filter_input(self, rule: str) -> None:
        """Add an nftables rule for packets that reach the scanned side: `ip daddr 10.77.1.0/24 drop`."""
        self._nft(f"add rule inet rules input {rule}\n")

    def filter_output(self, rule: str) -> None:
        """Add an nftables rule for packets that the scanned side sends."""
        self._nft(f"add rule inet rules output {rule}\n")

    def route(self, kind: str, network: str) -> None:
        """Make the scanned side a router without a way to `network`: `prohibit`, `unreachable` or `blackhole`."""
        self._ip(self._scanned, "route", "add", kind, network)

    def serve(self, places: Collection[tuple[str, int]], banner: bytes = b"") -> OpenPorts:
        """Accept connections at `places` while the context lasts, and send each the banner; without one, send nothing."""

        def listen() -> list[socket.socket]:
            return [socket.create_server(place, backlog=1024) for place in places]

        listeners = _in_namespace(self._scanned, listen)
        ending = threading.Event()
        server = threading.Thread(target=_serve, args=(listeners, banner, ending), name="servers", daemon=True)
        server.start()
        self._stack.callback(server.join)
        self._stack.callback(ending.set)
        return set(places)

    def on_scanned_side(self, make: Callable[[], _T]) -> _T:
        """Return the result of `make` there: sockets, which stay in the namespace in which they were created."""
        return _in_namespace(self._scanned, make)

    @contextmanager
    def capture(self) -> Iterator[list[Packet]]:
        """Yield the packets that leave the scanning side, with the kernel's time stamps; complete when the block has ended."""

        def tap() -> socket.socket:
            found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
            found.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            found.settimeout(_CHECK_SECONDS)
            return found

        packets: list[Packet] = []
        ending = threading.Event()
        with _in_namespace(self._scanner, tap) as tapped:
            reader = threading.Thread(target=_read, args=(tapped, packets, ending), name="capture", daemon=True)
            reader.start()
            try:
                yield packets
            finally:
                ending.set()
                reader.join()

    def _ip(self, namespace: str, *arguments: str) -> None:
        _run("ip", "-netns", namespace, *arguments)

    def _nft(self, text: str) -> None:
        _run(*_inside(self._scanned, _path("nft"), "-f", "-"), text=text)


def busiest_second(packets: Sequence[Packet]) -> int:
    """Return the most packets of any window of one second."""
    times = sorted(packet.at for packet in packets)
    begin = most = 0
    for end, at in enumerate(times):
        while times[begin] <= at - 1:
            begin += 1
        most = max(most, end - begin + 1)
    return most


def ahead(packets: Sequence[Packet], rate: float) -> float:
    """Return the most packets by which a program was ahead of a schedule of `rate` packets per second from its first on.

    nmap keeps to such a schedule: after the kernel did not run it for a moment, it catches up. So a busy machine changes the
    busiest second, but does not put nmap ahead of its schedule.
    """
    times = sorted(packet.at for packet in packets)
    return max(number - rate * (at - times[0]) for number, at in enumerate(times))


def most_at_once(groups: Collection[Sequence[Packet]]) -> int:
    """Return the most groups of packets that are in progress at a time, from their first to their last packet."""
    edges = [edge for group in groups for edge in ((min(group).at, 1), (max(group).at, -1))]
    return max(accumulate(change for _, change in sorted(edges, key=lambda edge: (edge[0], -edge[1]))))


def gaps(packets: Sequence[Packet]) -> list[float]:
    """Return the seconds between each two successive packets to the same address."""
    last: dict[str, float] = {}
    found = []
    for packet in sorted(packets, key=lambda packet: packet.at):
        if packet.address in last:
            found.append(packet.at - last[packet.address])
        last[packet.address] = packet.at
    return found


def by_address(packets: Sequence[Packet]) -> Counter[str]:
    """Return how many packets went to each address."""
    return Counter(packet.address for packet in packets)


def _serve(listeners: Sequence[socket.socket], banner: bytes, ending: threading.Event) -> None:
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for listener in listeners:
            stack.enter_context(listener)
            selector.register(listener, selectors.EVENT_READ, listener)
        while not ending.is_set():
            for key, _ in selector.select(_CHECK_SECONDS):
                connection, _ = key.data.accept()
                if banner:
                    with connection, suppress(OSError):
                        connection.sendall(banner)
                else:
                    stack.enter_context(connection)


def _read(tapped: socket.socket, packets: list[Packet], ending: threading.Event) -> None:
    def take() -> None:
        data, ancillary, _, (_, kind, direction, *_) = tapped.recvmsg(_HEADER_BYTES, 64)
        if kind == _ETH_P_IP and direction == socket.PACKET_OUTGOING:
            packets.append(_packet(data[14:], ancillary))

    while not ending.is_set():
        with suppress(TimeoutError):
            take()
    tapped.setblocking(False)
    with suppress(BlockingIOError):
        while True:  # the packets that were sent before the end, which wait in the socket
            take()


def _packet(data: bytes, ancillary: Sequence[tuple[int, int, bytes]]) -> Packet:
    ((_, _, stamp),) = ancillary
    seconds, nanoseconds = struct.unpack("@qq", stamp[:16])
    protocol, begin = data[9], (data[0] & 0x0F) * 4
    has_ports = protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
    (port,) = struct.unpack_from("!H", data, begin + 2) if has_ports else (0,)
    return Packet(seconds + nanoseconds / 1e9, str(ip_address(data[16:20])), protocol, port)


def _in_namespace(namespace: str, make: Callable[[], _T]) -> _T:
    """Return the result of `make` in a namespace: sockets stay in the namespace in which they were created."""

    def enter_and_make() -> _T:
        with _file(namespace).open("rb") as file:
            # Of this thread alone, which ends with the block below. os.setns is new in Python 3.12.
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)
        return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter_and_make).result()


def _inside(namespace: str, *arguments: str) -> list[str]:
    # Unlike `ip netns exec` this does not change the mounts.
    return [_path("nsenter"), f"--net={_file(namespace)}", "--", *arguments]


def _file(namespace: str) -> Path:
    return Path("/run/netns") / namespace


def _path(program: str) -> str:
    """Raises: FileNotFoundError: it is not installed."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(f"{program} is not installed")
    return found


def _run(program: str, *arguments: str, text: str | None = None) -> None:
    done = subprocess.run([_path(program), *arguments], input=text, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        refused = "not permitted" in done.stderr or "Permission denied" in done.stderr
        error = PermissionError if refused else OSError
        raise error(f"{program} {' '.join(arguments)} failed: {done.stderr.strip()}")
