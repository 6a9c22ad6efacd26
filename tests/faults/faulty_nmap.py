"""An nmap that some addresses break: it runs real nmap, and fails in place of its output about them.

Run as `python faulty_nmap.py ADDRESS=FAULT,… ARGUMENT…`, with the arguments of nmap.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from ipaddress import ip_address, ip_network
from typing import Final


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def flood() -> None:
    while True:
        sys.stdout.buffer.write(b"<elem>x</elem>" * 5_000)


def break_xml() -> None:
    sys.stdout.buffer.write(b'<ports></host></nmaprun>\0"')


FAULTS: Final[Mapping[str, Callable[[], None]]] = {"crash": crash, "flood": flood, "break_xml": break_xml}


def main(faults: str, *arguments: str) -> int:
    broken = dict(each.split("=") for each in faults.split(","))
    targets = [ip_network(each) for each in arguments[arguments.index("--") + 1 :]]
    # A crash loses the hosts of its group, which nmap reports together; other faults are of the element of a single host.
    places = {
        b"<host " if fault == "crash" else f'addr="{address}"'.encode(): FAULTS[fault]
        for address, fault in broken.items()
        if any(ip_address(address) in target for target in targets)
    }
    with subprocess.Popen(["nmap", *arguments], stdout=subprocess.PIPE) as nmap:
        assert nmap.stdout is not None
        for line in nmap.stdout:
            for place, fail in places.items():
                if place in line:
                    nmap.kill()
                    fail()
                    return 0
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    return nmap.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
