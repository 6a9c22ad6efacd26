"""Measure the platform against real alternatives in the same run: `python -m bench [PART …]`."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from bench import backlog, capacity, command, control, fleet, http_client, platform, silent, xml_reader
from bench.figures import Figure, show

Part = Callable[[], Iterable[Figure]]

PARTS: Final[Mapping[str, Part]] = {
    "platform": platform.measure,
    "control": control.measure,
    "backlog": backlog.measure,
    "capacity": capacity.measure,
    "fleet": fleet.measure,
    "silent": silent.measure,
    "xml_reader": xml_reader.measure,
    "http_client": http_client.measure,
    "command": command.measure,
}


def main(arguments: Sequence[str], parts: Mapping[str, Part]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(parts)}; all without any")
    names = parser.parse_args(arguments).parts or list(parts)
    if unknown := [name for name in names if name not in parts]:
        parser.error(f"unknown part {unknown[0]}: choose from {', '.join(parts)}")
    figures, failed = measure({name: parts[name] for name in names})
    show(figures)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def measure(parts: Mapping[str, Part]) -> tuple[Sequence[Figure], Sequence[str]]:
    """Return the figures of all parts, also those that a part measured before it failed, and the names of the failed parts."""
    figures: list[Figure] = []
    failed: list[str] = []
    for name, part in parts.items():
        try:
            for figure in part():
                figures.append(figure)  # noqa: PERF402 # one at a time: the next one may raise
        except Exception:  # noqa: BLE001 # a failure of one part does not stop the others
            print(f"{name} failed:", file=sys.stderr)
            traceback.print_exc()
            failed.append(name)
    return figures, failed


if __name__ == "__main__":
    main(sys.argv[1:], PARTS)
