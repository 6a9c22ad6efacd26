"""Write nmap's data folder: the services of a run's ports, the list of scripts, and a script engine that confines scripts.

nmap searches this folder first and loads all other files from its installation: scripts, libraries, probes, fingerprints.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from functools import lru_cache
from pathlib import Path
from typing import Final, Self

from scanfleet.scanning.policy import VERSION_SCRIPTS
from scanfleet.scanning.ports import PortSet

_ENGINE: Final = Path(__file__).with_name("confined.lua")
_SERVICES: Final = "nmap-services"
# As nmap reads a line: the frequency can be missing, and the first of two lines of a port has its name.
_SERVICE: Final = re.compile(r"^[ \t]*([^\s#]\S*[ \t]+([0-9]{1,5})/(tcp|udp)\b[^\n#]*)", re.MULTILINE)


class ServiceTable:
    """nmap's table of services, of which a run needs only the lines of its ports: their names and how common they are.

    nmap reads the table whenever it starts. All 27,000 lines take 20 ms of CPU time, most of a scan of one host.
    """

    def __init__(self, lines: Mapping[tuple[str, int], str]) -> None:
        self._lines = lines
        self.of = lru_cache(maxsize=16)(self._of)  # the chunks of a job share a few port sets; one has 200 KB at most

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the table of the installation in `folder`.

        Raises:
            OSError: it cannot be read.
        """
        text = (folder / _SERVICES).read_text(encoding="utf-8", errors="replace")
        lines: dict[tuple[str, int], str] = {}
        for line, number, protocol in _SERVICE.findall(text):
            lines.setdefault((protocol, int(number)), line.rstrip())
        return cls(lines)

    def _of(self, ports: PortSet) -> str:
        """Return the lines of these ports, which are no `top` set."""
        wanted = [*_keys("tcp", ports.tcp), *_keys("udp", ports.udp)]
        return "".join(f"{self._lines[key]}\n" for key in wanted if key in self._lines)


def write(folder: Path, scripts: AbstractSet[str], services: str | None) -> None:
    """Create `folder` and its files.

    Args:
        folder: the data folder.
        scripts: the scripts that nmap may run.
        services: the lines of the run's ports; None if nmap reads its own table.

    Raises:
        OSError: the folder cannot be written.
    """
    (folder / "scripts").mkdir(parents=True)
    shutil.copyfile(_ENGINE, folder / "nse_main.lua")
    (folder / "scripts" / "script.db").write_text("".join(map(_entry, sorted(scripts))), encoding="utf-8")
    if services is not None:
        (folder / _SERVICES).write_text(services, encoding="utf-8")


def _entry(name: str) -> str:
    # Service detection runs every script of the category "version", and nothing else selects by category.
    categories = '"version"' if name in VERSION_SCRIPTS else ""
    return f'Entry {{ filename = "{name}.nse", categories = {{ {categories} }} }}\n'


def _keys(protocol: str, ranges: Iterable[tuple[int, int]]) -> Iterable[tuple[str, int]]:
    return ((protocol, number) for first, last in ranges for number in range(first, last + 1))
