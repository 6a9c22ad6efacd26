"""Programs that tests run inside containers and pods."""

from __future__ import annotations

from typing import Final

REACHED: Final = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor
def reached(target):
    name, port = target.split(":")
    try:
        address = socket.gethostbyname(name)
        with socket.create_connection((address, int(port)), timeout=3):
            return name
    except OSError:
        return None
with ThreadPoolExecutor() as threads:
    print(*filter(None, threads.map(reached, sys.argv[1:])))
"""
"""Prints the names of those arguments `name:port` to which it can connect."""
