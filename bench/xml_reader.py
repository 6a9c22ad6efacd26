"""The worker's XML reader against python-nmap's whole-document parse, and its memory from a /20 to a /16."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address

import nmap

from bench.figures import Figure
from scanner_worker.scanner import python_nmap
from scanner_worker.scanner.xml import Reader

PIECE_BYTES = 1 << 16  # capacity of a pipe
ROUNDS = 7  # the best of so many, in turns: other processes affect all sides equally

HEAD = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE nmaprun>
<?xml-stylesheet href="file:///usr/bin/../share/nmap/nmap.xsl" type="text/xsl"?>
<nmaprun scanner="nmap" args="nmap -v -n -oX -" start="1" startstr="now" version="7.93" xmloutputversion="1.05">
<scaninfo type="syn" protocol="tcp" numservices="100" services="1-100"/>
<verbose level="1"/>
<debugging level="0"/>
"""
DOWN = """<host><status state="down" reason="no-response" reason_ttl="0"/>
<address addr="{address}" addrtype="ipv4"/>
</host>
"""
UP = """<host starttime="1795409019" endtime="1795409019"><status state="up" reason="echo-reply" reason_ttl="64"/>
<address addr="{address}" addrtype="ipv4"/>
<hostnames>
</hostnames>
<ports><extraports state="closed" count="{closed}">
<extrareasons reason="reset" count="{closed}" proto="tcp" ports="1-21,23-79,81-100"/>
</extraports>
{ports}</ports>
<times srtt="12" rttvar="211" to="100000"/>
</host>
"""
PORTS = (
    '<port protocol="tcp" portid="22"><state state="open" reason="syn-ack" reason_ttl="64"/><service name="ssh" '
    'product="OpenSSH" version="9.2p1 Debian 2+deb12u3" extrainfo="protocol 2.0" ostype="Linux" method="probed" conf="10">'
    "<cpe>cpe:/a:openbsd:openssh:9.2p1</cpe></service></port>\n"
    '<port protocol="tcp" portid="80"><state state="open" reason="syn-ack" reason_ttl="64"/><service name="http" '
    'product="nginx" version="1.22.1" method="probed" conf="10"><cpe>cpe:/a:igor_sysoev:nginx:1.22.1</cpe></service>'
    '<script id="banner" output="HTTP/1.1 400 Bad Request&#xa;Server: nginx/1.22.1"/></port>\n'
)
TAIL = """<runstats><finished time="1" timestr="now" summary="done" elapsed="1" exit="success"/>\
<hosts up="1" down="1" total="2"/>
</runstats>
</nmaprun>
"""


def document(prefix_length: int) -> Iterator[bytes]:
    """Return a sparse network as nmap writes it: of 16 addresses 12 are down, 3 have all ports closed, 1 has two open."""
    first = int(ip_address("10.0.0.0"))
    yield HEAD.encode()
    for index in range(1 << (32 - prefix_length)):
        address = ip_address(first + index)
        if index % 16 < 12:  # noqa: PLR2004 # the mixture that the docstring names
            yield DOWN.format(address=address).encode()
        elif index % 16:
            yield UP.format(address=address, closed=100, ports="").encode()
        else:
            yield UP.format(address=address, closed=98, ports=PORTS).encode()
    yield TAIL.encode()


def pieces(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in the pieces that a pipe delivers."""
    held = bytearray()
    for part in parts:
        held += part
        if len(held) >= PIECE_BYTES:
            yield bytes(held[:PIECE_BYTES])
            del held[:PIECE_BYTES]
    yield bytes(held)


def read(parts: Iterator[bytes], *, views: bool) -> int:
    reader = Reader(max_host_bytes=1 << 25)
    ports = 0
    for piece in parts:
        for host in reader.feed(piece):
            if views:
                ports += len(python_nmap.read(host)[1])
    reader.close()
    return ports


def peak_kb(prefix_length: int) -> int:
    """Return the peak memory in kB of a process that reads such a document."""
    output = subprocess.check_output([sys.executable, "-m", "bench.xml_reader", str(prefix_length)])  # this file
    return int(output)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure() -> Sequence[Figure]:
    whole = b"".join(document(20)).decode()
    cut = list(pieces(document(20)))
    parser = object.__new__(nmap.PortScanner)  # without the constructor, which runs nmap
    sides: dict[str, Callable[[], object]] = {
        "python_nmap": lambda: parser.analyse_nmap_xml_scan(whole),
        "reader": lambda: read(iter(cut), views=False),
        "reader_with_views": lambda: read(iter(cut), views=True),
    }
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(ROUNDS):
        for name, work in sides.items():
            best[name] = min(best[name], seconds(work))
    small, large = peak_kb(20), peak_kb(16)
    return [
        Figure(
            "reader_ratio", best["python_nmap"] / best["reader"], "python-nmap's CPU / the reader's, a /20", at_least=1
        ),
        Figure(
            "reader_views_ratio",
            best["python_nmap"] / best["reader_with_views"],
            "the same with the views of all ports",
        ),
        Figure("reader_growth", large / small, "peak memory for a /16 / for a /20", at_most=1.1),
    ]


if __name__ == "__main__":  # a separate process for one document, whose memory is measured
    read(pieces(document(int(sys.argv[1]))), views=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
